// The best features of one sample, one after the other.
#pragma once

#include "pursuit/tile.h"

namespace {

constexpr int64_t kPile = 4 * kLanes;  // scores whose maximum is kept together

// Scores, largest first: piles under their maxima, which may be stale (too large) and are mended when they come up.
class Picker {
 public:
  // `scores` has room up to the next multiple of kPile, `pile_max` for padded(that / kPile).
  Picker(float* scores, float* pile_max, int64_t n) : scores_(scores), pile_max_(pile_max), piles_((n + kPile - 1) / kPile) {
    for (int64_t j = n; j < piles_ * kPile; ++j) scores_[j] = -1.0f;
    for (int64_t pile = 0; pile < piles_; ++pile) pile_max_[pile] = largest_in(pile);
    for (int64_t pile = piles_; pile < padded(piles_); ++pile) pile_max_[pile] = -1.0f;
  }

  // The first of the largest scores, which is taken out; -1 when its score does not exceed `floor`.
  int32_t pop(float floor) {
    for (;;) {
      VF best = splat(-1.0f);
      for (int64_t p = 0; p < piles_; p += kLanes) best = greater_of(load(pile_max_ + p), best);
      const float largest = max_lanes(best);
      if (!(largest > floor)) return -1;
      const int64_t pile = first_equal(pile_max_, largest);
      const float really = largest_in(pile);
      if (really < largest) {
        pile_max_[pile] = really;
        continue;
      }
      const int64_t j = pile * kPile + first_equal(scores_ + pile * kPile, largest);
      scores_[j] = -1.0f;
      return static_cast<int32_t>(j);
    }
  }

 private:
  float largest_in(int64_t pile) const {
    const float* p = scores_ + pile * kPile;
    return max_lanes(greater_of(greater_of(load(p), load(p + kLanes)), greater_of(load(p + 2 * kLanes), load(p + 3 * kLanes))));
  }

  float *scores_, *pile_max_;
  int64_t piles_;
};

}  // namespace
