// Least squares on the growing support of one sample.
//
// With L the Cholesky factor of the support's Gram matrix, U = L^-T is kept explicitly: a new column w has
// y = L^-1 W_S^T w = U^T g with g = W_S^T w, which is nonzero only where columns share a row; then pivot^2 = 1 - |y|^2 and
// the new column of U is (-U y, 1) / pivot. No triangular solve, no chain of dependent steps.
#pragma once

#include "pursuit/support.h"

namespace {

class Factor {
 public:
  void place(Arena& arena, const PursuitArgs& args) {
    stride_ = padded(args.k);
    support.place(arena, args);
    columns_ = arena.take<float>(stride_ * args.k);
    lines_ = arena.take<float>(stride_ * args.k);
    x_ = arena.take<float>(stride_);
    y_ = arena.take<float>(stride_);
    g_ = arena.take<float>(stride_);
    right_ = arena.take<float>(stride_);
    touched_ = arena.take<int32_t>(args.k * args.d + 1);
  }

  // Once per allocation.
  void initialise() {
    support.initialise();
    for (int64_t s = 0; s < stride_; ++s) x_[s] = y_[s] = g_[s] = right_[s] = 0.0f;
  }

  void clear() {
    for (int64_t s = 0; s < count(); ++s) x_[s] = right_[s] = 0.0f;
    support.clear();
  }

  int64_t count() const { return support.count(); }
  const float* coefficients() const { return x_; }

  // Adds the column with right-hand side `right` = <w, residual>; false when it depends on the support.
  bool append(int32_t feature, float right) {
    const int64_t t = support.count(), width = padded(t);
    int32_t touched = 0;
    support.overlaps(feature, [&](int32_t slot, float product) {
      // Listed at its first product, and again should the sum come back to exactly zero, which does no harm.
      touched_[touched] = slot;
      touched += g_[slot] == 0.0f;
      g_[slot] += product;
    });
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
    support.append(feature);
    right_[t] = right;
    return true;
  }

  // x += (W_S^T W_S)^-1 right for the slots from `first` on, whose right-hand sides alone are nonzero.
  void settle(int64_t first) {
    for (int64_t t = first; t < count(); ++t) {
      const float* column = columns_ + t * stride_;
      VF total = VF{};
      for (int64_t s = first / kLanes * kLanes; s <= t; s += kLanes) total += load(column + s) * load(right_ + s);
      const VF z = splat(sum_lanes(total));
      for (int64_t s = 0; s <= t; s += kLanes) store(x_ + s, load(x_ + s) + z * load(column + s));
    }
    for (int64_t t = first; t < count(); ++t) right_[t] = 0.0f;
  }

  // One step of iterative refinement: x += (W_S^T W_S)^-1 W_S^T residual.
  void refine(const float* residual, int64_t step) {
    support.correlate(residual, step, right_);
    for (int64_t chunk = 0; chunk < count(); chunk += kLanes) {
      VF total = VF{};
      const int64_t last = count() < chunk + kLanes ? count() : chunk + kLanes;
      for (int64_t s = 0; s < last; ++s) total += splat(right_[s]) * load(lines_ + s * stride_ + chunk);
      store(y_ + chunk, total);
    }
    combine_columns(y_, count(), splat(1.0f), x_, true);
    for (int64_t s = 0; s < count(); ++s) right_[s] = 0.0f;
  }

  Support support;

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

  int64_t stride_;
  float *columns_, *lines_;  // U by columns and by rows
  float *x_, *y_, *g_, *right_;
  int32_t* touched_;
};

}  // namespace
