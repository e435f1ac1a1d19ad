// Least squares on the growing support of one sample.
//
// With L the Cholesky factor of the support's Gram matrix, U = L^-T is kept explicitly: a new column w has
// y = L^-1 W_S^T w = U^T g with g = W_S^T w, which is nonzero only where columns share a row, found by linked lists; then
// pivot^2 = 1 - |y|^2 and the new column of U is (-U y, 1) / pivot. No triangular solve, no dependency chain.
#pragma once

#include <cmath>

#include "pursuit.h"
#include "simd.h"

namespace {

EXPANDER_INLINE int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

EXPANDER_INLINE float sum_lanes(VF v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
  }
  return lane[0];
}

EXPANDER_INLINE VF greater_of(VF a, VF b) { return a > b ? a : b; }  // b where a is NaN

EXPANDER_INLINE float max_lanes(VF v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] = lane[l] > lane[l + width] ? lane[l] : lane[l + width];
  }
  return lane[0];
}

constexpr float kEpsilon = 1.1920929e-7f;
constexpr float kPivotFloor = 16 * kEpsilon;  // squared distance to the span below which a unit column is dependent
constexpr float kFloor = 32 * kEpsilon;       // correlations below this share of the sample's norm are rounding error

// Hands out pieces of one allocation on cache-line boundaries; with base == nullptr it only measures.
struct Arena {
  char* base;
  size_t at = 0;

  template <class T>
  T* take(int64_t count) {
    T* const piece = base != nullptr ? reinterpret_cast<T*>(base + at) : nullptr;
    at += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

class Factor {
 public:
  void place(Arena& arena, const expander::PursuitArgs& args) {
    a_ = &args;
    stride_ = padded(args.k);
    columns_ = arena.take<float>(stride_ * args.k);
    lines_ = arena.take<float>(stride_ * args.k);
    x_ = arena.take<float>(stride_);
    y_ = arena.take<float>(stride_);
    g_ = arena.take<float>(stride_);
    right_ = arena.take<float>(stride_);
    features_ = arena.take<int32_t>(stride_);
    touched_ = arena.take<int32_t>(stride_ * 2);
    head_ = arena.take<int32_t>(args.m);
    next_ = arena.take<int32_t>(args.k * args.d);
    value_ = arena.take<float>(args.k * args.d);
  }

  // Once per allocation.
  void initialise() {
    count_ = 0;
    for (int64_t i = 0; i < a_->m; ++i) head_[i] = -1;
    for (int64_t s = 0; s < stride_; ++s) x_[s] = y_[s] = g_[s] = right_[s] = 0.0f, features_[s] = -1;
  }

  void clear() {
    for (int64_t s = 0; s < count_; ++s) {
      const int32_t* rows = a_->rows + features_[s] * a_->d;
      for (int64_t t = 0; t < a_->d; ++t) head_[rows[t]] = -1;
      x_[s] = right_[s] = 0.0f;
      features_[s] = -1;
    }
    count_ = 0;
  }

  int64_t count() const { return count_; }
  const int32_t* features() const { return features_; }
  const float* coefficients() const { return x_; }

  bool holds(int32_t feature) const {
    VI hit = VI{};
    for (int64_t s = 0; s < count_; s += kLanes) hit |= load(features_ + s) == splat(feature);
    int32_t any = 0;
    for (int l = 0; l < kLanes; ++l) any |= hit[l];
    return any != 0;
  }

  // Adds the column with right-hand side `right` = <w, residual>; false when it depends on the support.
  bool append(int32_t feature, float right) {
    const int64_t d = a_->d, t = count_;
    const int32_t* rows = a_->rows + feature * d;
    const float* values = a_->values + feature * d;
    int32_t touched = 0;
    for (int64_t i = 0; i < d; ++i) {
      for (int32_t e = head_[rows[i]]; e >= 0; e = next_[e]) {
        const auto slot = static_cast<int32_t>(e / d);
        if (g_[slot] == 0.0f && touched < 2 * stride_) touched_[touched++] = slot;
        g_[slot] += values[i] * value_[e];
      }
    }
    const int64_t width = padded(t);
    for (int64_t s = 0; s < width; s += kLanes) store(y_ + s, VF{});
    for (int32_t i = 0; i < touched; ++i) {
      const int32_t slot = touched_[i];
      const VF weight = splat(g_[slot]);
      g_[slot] = 0.0f;
      const float* line = lines_ + slot * stride_;
      for (int64_t s = slot / kLanes * kLanes; s < width; s += kLanes) {
        store(y_ + s, load(y_ + s) + weight * load(line + s));
      }
    }
    VF squares = VF{};
    for (int64_t s = 0; s < width; s += kLanes) squares += load(y_ + s) * load(y_ + s);
    const float pivot = 1.0f - sum_lanes(squares);
    if (!(pivot > kPivotFloor)) return false;

    const float inverse = 1.0f / std::sqrt(pivot);
    float* const column = columns_ + t * stride_;
    combine_columns(y_, t, splat(-inverse), column, false);
    for (int64_t s = width; s < stride_; s += kLanes) store(column + s, VF{});
    column[t] = inverse;
    float* const line = lines_ + t * stride_;
    for (int64_t s = 0; s < stride_; s += kLanes) store(line + s, VF{});
    for (int64_t s = 0; s <= t; ++s) lines_[s * stride_ + t] = column[s];
    for (int64_t i = 0; i < d; ++i) {
      const auto e = static_cast<int32_t>(t * d + i);
      value_[e] = values[i];
      next_[e] = head_[rows[i]];
      head_[rows[i]] = e;
    }
    features_[t] = feature;
    right_[t] = right;
    count_ = t + 1;
    return true;
  }

  // x += (W_S^T W_S)^-1 right for the slots from `first` on, whose right-hand sides alone are nonzero.
  void settle(int64_t first) {
    for (int64_t t = first; t < count_; ++t) {
      const float* column = columns_ + t * stride_;
      VF total = VF{};
      for (int64_t s = first / kLanes * kLanes; s <= t; s += kLanes) total += load(column + s) * load(right_ + s);
      const VF z = splat(sum_lanes(total));
      for (int64_t s = 0; s <= t; s += kLanes) store(x_ + s, load(x_ + s) + z * load(column + s));
    }
    for (int64_t t = first; t < count_; ++t) right_[t] = 0.0f;
  }

  // residual = target - W_S x, entry i of either at [i * step].
  void residual(const float* target, float* residual, int64_t step) const {
    if (step == 1) std::memcpy(residual, target, static_cast<size_t>(a_->m) * sizeof(float));
    else for (int64_t i = 0; i < a_->m; ++i) residual[i * step] = target[i * step];
    const int64_t d = a_->d;
    for (int64_t s = 0; s < count_; ++s) {
      const int32_t* rows = a_->rows + features_[s] * d;
      const float x = x_[s];
      const float* values = value_ + s * d;
      for (int64_t t = 0; t < d; ++t) residual[rows[t] * step] -= x * values[t];
    }
  }

  // One step of iterative refinement: x += (W_S^T W_S)^-1 W_S^T residual. On x = 0 and residual = target: the solve.
  void refine(const float* residual, int64_t step) {
    const int64_t d = a_->d;
    for (int64_t s = 0; s < count_; ++s) {
      const int32_t* rows = a_->rows + features_[s] * d;
      const float* values = value_ + s * d;
      float total = 0.0f;
      for (int64_t t = 0; t < d; ++t) total += residual[rows[t] * step] * values[t];
      right_[s] = total;
    }
    for (int64_t chunk = 0; chunk < count_; chunk += kLanes) {
      VF total = VF{};
      const int64_t last = count_ < chunk + kLanes ? count_ : chunk + kLanes;
      for (int64_t s = 0; s < last; ++s) total += splat(right_[s]) * load(lines_ + s * stride_ + chunk);
      store(y_ + chunk, total);
    }
    combine_columns(y_, count_, splat(1.0f), x_, true);
    for (int64_t s = 0; s < count_; ++s) right_[s] = 0.0f;
  }

 private:
  // out = scale * sum_{s < count} weight[s] * column s, or out += that.
  void combine_columns(const float* weight, int64_t count, VF scale, float* out, bool add) const {
    for (int64_t chunk = 0; chunk < count; chunk += kLanes) {
      const float* from = columns_ + chunk;
      VF total[4] = {VF{}, VF{}, VF{}, VF{}};
      int64_t s = chunk;
      for (; s + 4 <= count; s += 4) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) total[u] += splat(weight[s + u]) * load(from + (s + u) * stride_);
      }
      for (; s < count; ++s) total[0] += splat(weight[s]) * load(from + s * stride_);
      const VF sum = scale * ((total[0] + total[1]) + (total[2] + total[3]));
      store(out + chunk, add ? load(out + chunk) + sum : sum);
    }
  }

  const expander::PursuitArgs* a_;
  int64_t stride_, count_;
  float *columns_, *lines_;  // U by columns and by rows
  float *x_, *y_, *g_, *right_;
  int32_t *features_, *touched_;
  int32_t *head_, *next_;  // entries of the support, linked by row; entry e belongs to slot e / d
  float* value_;
};

}  // namespace
