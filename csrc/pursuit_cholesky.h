// Least squares on a whole support at once: Gram matrix, Cholesky, two triangular solves, all in the L1 cache.
#pragma once

#include "pursuit_support.h"

namespace {

class Cholesky {
 public:
  void place(Arena& arena, const PursuitArgs& args) {
    stride_ = padded(args.k);
    factor_ = arena.take<float>(stride_ * args.k);
    inverse_ = arena.take<float>(stride_);
    right_ = arena.take<float>(stride_);
  }

  // Factors the Gram matrix of `features`, which `support` (empty before) then holds. A column that depends on earlier ones
  // becomes a slot of the identity with inverse_ = 0: its coefficient is 0.
  void factor(Support& support, const int32_t* features, int64_t count) {
    count_ = count;
    for (int64_t s = 0; s < count; ++s) {
      float* const column = factor_ + s * stride_;
      for (int64_t i = s / kLanes * kLanes; i < stride_; i += kLanes) store(column + i, VF{});
    }
    for (int64_t t = 0; t < count; ++t) {
      support.overlaps(features[t], [&](int32_t slot, float product) { factor_[slot * stride_ + t] += product; });
      factor_[t * stride_ + t] = 1.0f;
      support.append(features[t]);
    }
    least_ = 1.0f;
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t chunk = j / kLanes * kLanes; chunk < count;) {
        const int64_t left = (count - chunk + kLanes - 1) / kLanes;
        if (left >= 4) eliminate<4>(j, chunk), chunk += 4 * kLanes;
        else if (left >= 2) eliminate<2>(j, chunk), chunk += 2 * kLanes;
        else eliminate<1>(j, chunk), chunk += kLanes;
      }
      float* const column = factor_ + j * stride_;
      const float pivot = column[j];
      if (!(pivot > kPivotFloor)) {
        for (int64_t s = 0; s < j; ++s) factor_[s * stride_ + j] = 0.0f;
        for (int64_t i = j / kLanes * kLanes; i < count; i += kLanes) store(column + i, VF{});
        inverse_[j] = 0.0f;
        continue;
      }
      least_ = pivot < least_ ? pivot : least_;
      const float inverse = 1.0f / std::sqrt(pivot);
      inverse_[j] = inverse;
      const int64_t first = j / kLanes * kLanes;
      for (int64_t i = first; i < count; i += kLanes) store(column + i, load(column + i) * splat(inverse));
      for (int64_t i = first; i < j; ++i) column[i] = 0.0f;
    }
  }

  bool taken(int64_t slot) const { return inverse_[slot] > 0.0f; }

  // Whether rounding in the normal equations is worth a step of refinement.
  bool delicate() const { return least_ < 0.05f; }

  // x += (W_S^T W_S)^-1 W_S^T residual.
  void solve(const Support& support, const float* residual, float* x) {
    support.correlate(residual, 1, right_);
    for (int64_t i = count_; i < stride_; ++i) right_[i] = 0.0f;
    for (int64_t j = 0; j < count_; ++j) {
      const float y = right_[j] * inverse_[j];
      const float* column = factor_ + j * stride_;
      for (int64_t i = j / kLanes * kLanes; i < count_; i += kLanes) {
        store(right_ + i, load(right_ + i) - splat(y) * load(column + i));
      }
      right_[j] = y;
    }
    for (int64_t j = count_ - 1; j >= 0; --j) {
      const float* column = factor_ + j * stride_;
      const float y = right_[j];
      right_[j] = 0.0f;
      VF total = VF{};
      for (int64_t i = j / kLanes * kLanes; i < count_; i += kLanes) total += load(column + i) * load(right_ + i);
      right_[j] = (y - sum_lanes(total)) * inverse_[j];
      x[j] += right_[j];
    }
  }

 private:
  // Rows [chunk, chunk + kVectors * kLanes) of column j, less the earlier columns.
  template <int kVectors>
  EXPANDER_INLINE void eliminate(int64_t j, int64_t chunk) {
    VF total[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) total[v] = load(factor_ + j * stride_ + chunk + v * kLanes);
    for (int64_t s = 0; s < j; ++s) {
      const float* column = factor_ + s * stride_;
      const VF weight = splat(column[j]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[v] -= weight * load(column + chunk + v * kLanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(factor_ + j * stride_ + chunk + v * kLanes, total[v]);
  }

  int64_t stride_, count_;
  float *factor_, *inverse_, *right_;
  float least_;
};

}  // namespace
