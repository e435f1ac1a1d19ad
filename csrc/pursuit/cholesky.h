// Least squares on a whole support at once: Gram matrix, Cholesky, triangular solves, all in the L1 cache.
#pragma once

#include "pursuit/support.h"

namespace {

class Cholesky {
 public:
  void place(Arena& arena, const PursuitArgs& args) {
    stride_ = padded(args.k);
    gram_ = arena.take<float>(stride_ * args.k);
    factor_ = arena.take<float>(stride_ * args.k);
    inverse_ = arena.take<float>(stride_);
    right_ = arena.take<float>(stride_);
    work_ = arena.take<float>(stride_);
    full_ = arena.take<float>(stride_);
    active_ = arena.take<uint8_t>(stride_);
    closed_ = arena.take<uint8_t>(stride_);
  }

  // Takes the Gram matrix of `features`, which `support` (empty before) then holds. All slots are active.
  void load_support(Support& support, const int32_t* features, int64_t count) {
    count_ = count;
    for (int64_t s = 0; s < count; ++s) {
      float* const column = gram_ + s * stride_;
      for (int64_t i = s / kLanes * kLanes; i < stride_; i += kLanes) store(column + i, VF{});
    }
    for (int64_t t = 0; t < count; ++t) {
      support.overlaps(features[t], [&](int32_t slot, float product) { gram_[slot * stride_ + t] += product; });
      gram_[t * stride_ + t] = 1.0f;
      support.append(features[t]);
      active_[t] = 1;
      closed_[t] = 0;
    }
  }

  bool taken(int64_t slot) const { return inverse_[slot] > 0.0f; }

  // x = the least-squares coefficients for `target`; `residual` (scratch) is left as target - W_S x. A column that depends
  // on earlier ones gets 0.
  void solve(const Support& support, const float* target, float* x, float* residual, int64_t m) {
    decompose();
    support.correlate(target, 1, right_);
    solve_into(right_, x);
    update(support, target, x, residual, m);
    if (least_ > 0.05f) return;
    // Rounding in the normal equations is worth a step of refinement.
    support.correlate(residual, 1, right_);
    solve_into(right_, full_);
    for (int64_t s = 0; s < count_; ++s) x[s] += full_[s];
    update(support, target, x, residual, m);
  }

  // The same under x >= 0 (Lawson & Hanson 1974), starting from all columns. Slots without use end up with x = 0.
  void solve_nonnegative(
      const Support& support, const float* target, float floor, float* x, float* residual, int64_t m) {
    for (int64_t s = 0; s < count_; ++s) x[s] = 0.0f;
    for (int64_t round = 0; round < 3 * count_ + 1; ++round) {
      feasible(support, target, x);
      update(support, target, x, residual, m);
      support.correlate(residual, 1, right_);
      int64_t entering = -1;
      float steepest = floor;
      for (int64_t s = 0; s < count_; ++s) {
        if (active_[s] != 0 || closed_[s] != 0 || !(right_[s] > steepest)) continue;
        steepest = right_[s];
        entering = s;
      }
      if (entering < 0) return;
      active_[entering] = 1;
      closed_[entering] = 1;  // one more chance is enough: a second would be rounding going in circles
    }
  }

 private:
  void update(const Support& support, const float* target, const float* x, float* residual, int64_t m) const {
    std::memcpy(residual, target, static_cast<size_t>(m) * sizeof(float));
    support.subtract(x, residual, 1);
  }

  // From a feasible x to the least squares on the active slots, dropping the slots that leave x >= 0 on the way.
  void feasible(const Support& support, const float* target, float* x) {
    for (;;) {
      decompose();
      support.correlate(target, 1, right_);
      solve_into(right_, full_);
      float step = 1.0f;
      bool leaving = false;
      for (int64_t s = 0; s < count_; ++s) {
        if (active_[s] == 0 || full_[s] > 0.0f) continue;
        leaving = true;
        const float ratio = x[s] > 0.0f ? x[s] / (x[s] - full_[s]) : 0.0f;
        step = ratio < step ? ratio : step;
      }
      for (int64_t s = 0; s < count_; ++s) {
        if (active_[s] == 0) continue;
        const float ratio = x[s] > 0.0f ? x[s] / (x[s] - full_[s]) : 0.0f;
        const bool drop = full_[s] <= 0.0f && ratio <= step;
        x[s] = drop ? 0.0f : x[s] + step * (full_[s] - x[s]);
        active_[s] = !drop;
      }
      if (!leaving) return;
    }
  }

  // Factors the Gram matrix of the active slots. Other slots, and those dependent on earlier ones, become slots of the
  // identity with inverse_ = 0.
  void decompose() {
    least_ = 1.0f;
    for (int64_t j = 0; j < count_; ++j) {
      float* const column = factor_ + j * stride_;
      const int64_t first = j / kLanes * kLanes;
      for (int64_t i = first; i < count_; i += kLanes) store(column + i, load(gram_ + j * stride_ + i));
      if (active_[j] != 0) {
        for (int64_t chunk = first; chunk < count_;) {
          const int64_t left = (count_ - chunk + kLanes - 1) / kLanes;
          if (left >= 4) eliminate<4>(j, chunk), chunk += 4 * kLanes;
          else if (left >= 2) eliminate<2>(j, chunk), chunk += 2 * kLanes;
          else eliminate<1>(j, chunk), chunk += kLanes;
        }
      }
      const float pivot = column[j];
      if (active_[j] == 0 || !(pivot > kPivotFloor)) {
        for (int64_t s = 0; s < j; ++s) factor_[s * stride_ + j] = 0.0f;
        for (int64_t i = first; i < count_; i += kLanes) store(column + i, VF{});
        inverse_[j] = 0.0f;
        continue;
      }
      least_ = pivot < least_ ? pivot : least_;
      const float inverse = 1.0f / std::sqrt(pivot);
      inverse_[j] = inverse;
      for (int64_t i = first; i < count_; i += kLanes) store(column + i, load(column + i) * splat(inverse));
      for (int64_t i = first; i < j; ++i) column[i] = 0.0f;
    }
  }

  // out = (L L^T)^-1 right, 0 in slots left out.
  void solve_into(const float* right, float* out) {
    for (int64_t i = 0; i < stride_; ++i) work_[i] = i < count_ ? right[i] : 0.0f;
    for (int64_t j = 0; j < count_; ++j) {
      const float y = work_[j] * inverse_[j];
      const float* column = factor_ + j * stride_;
      for (int64_t i = j / kLanes * kLanes; i < count_; i += kLanes) {
        store(work_ + i, load(work_ + i) - splat(y) * load(column + i));
      }
      work_[j] = y;
    }
    for (int64_t j = count_ - 1; j >= 0; --j) {
      const float* column = factor_ + j * stride_;
      const float y = work_[j];
      work_[j] = 0.0f;
      VF total = VF{};
      for (int64_t i = j / kLanes * kLanes; i < count_; i += kLanes) total += load(column + i) * load(work_ + i);
      work_[j] = (y - sum_lanes(total)) * inverse_[j];
      out[j] = work_[j];
    }
  }

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
  float *gram_, *factor_, *inverse_;  // lower triangles by columns
  float *right_, *work_, *full_;
  uint8_t *active_, *closed_;
  float least_;  // pivot
};

}  // namespace
