// The support of one sample: its entries linked by row, so that Gram entries cost only what columns share.
#pragma once

#include "pursuit/tile.h"

namespace {

class Support {
 public:
  void place(Arena& arena, const PursuitArgs& args) {
    a_ = &args;
    const int64_t slots = padded(args.k);
    features_ = arena.take<int32_t>(slots);
    head_ = arena.take<int32_t>(args.m);
    next_ = arena.take<int32_t>(args.k * args.d);
    slot_ = arena.take<int32_t>(args.k * args.d);
    value_ = arena.take<float>(args.k * args.d);
  }

  void initialise() {
    count_ = 0;
    for (int64_t i = 0; i < a_->m; ++i) head_[i] = -1;
    for (int64_t s = 0; s < padded(a_->k); ++s) features_[s] = -1;
  }

  void clear() {
    for (int64_t s = 0; s < count_; ++s) {
      const int32_t* rows = a_->rows + features_[s] * a_->d;
      for (int64_t t = 0; t < a_->d; ++t) head_[rows[t]] = -1;
      features_[s] = -1;
    }
    count_ = 0;
  }

  int64_t count() const { return count_; }
  const int32_t* features() const { return features_; }

  bool holds(int32_t feature) const {
    const VI wanted = splat(feature);
    VI hit = VI{};
    for (int64_t s = 0; s < count_; s += kLanes) hit |= load(features_ + s) == wanted;
    int32_t any = 0;
    for (int l = 0; l < kLanes; ++l) any |= hit[l];
    return any != 0;
  }

  // visit(slot, product) for every entry of the support in a row of `feature`; their sum by slot is W_S^T w.
  template <class Visit>
  EXPANDER_INLINE void overlaps(int32_t feature, const Visit& visit) const {
    const int32_t* rows = a_->rows + feature * a_->d;
    const float* values = a_->values + feature * a_->d;
    for (int64_t t = 0; t < a_->d; ++t) {
      for (int32_t e = head_[rows[t]]; e >= 0; e = next_[e]) visit(slot_[e], values[t] * value_[e]);
    }
  }

  void append(int32_t feature) {
    const int64_t d = a_->d;
    const int32_t* rows = a_->rows + feature * d;
    const float* values = a_->values + feature * d;
    for (int64_t t = 0; t < d; ++t) {
      const auto e = static_cast<int32_t>(count_ * d + t);
      value_[e] = values[t];
      slot_[e] = static_cast<int32_t>(count_);
      next_[e] = head_[rows[t]];
      head_[rows[t]] = e;
    }
    features_[count_++] = feature;
  }

  // residual -= W_S x; entry i of the residual at [i * step].
  void subtract(const float* x, float* residual, int64_t step) const {
    const int64_t d = a_->d;
    for (int64_t s = 0; s < count_; ++s) {
      const int32_t* rows = a_->rows + features_[s] * d;
      const float* values = value_ + s * d;
      for (int64_t t = 0; t < d; ++t) residual[rows[t] * step] -= x[s] * values[t];
    }
  }

  // out = W_S^T residual.
  void correlate(const float* residual, int64_t step, float* out) const {
    const int64_t d = a_->d;
    for (int64_t s = 0; s < count_; ++s) {
      const int32_t* rows = a_->rows + features_[s] * d;
      const float* values = value_ + s * d;
      float total = 0.0f;
      for (int64_t t = 0; t < d; ++t) total += residual[rows[t] * step] * values[t];
      out[s] = total;
    }
  }

 private:
  const PursuitArgs* a_;
  int64_t count_;
  int32_t *features_, *head_, *next_, *slot_;  // head by row, then a chain of entries
  float* value_;
};

}  // namespace
