// Orthogonal matching pursuit on a tile of samples side by side: every round correlates all features with all residuals,
// contiguous loads and no gather; supports and their least squares are kept sample by sample (THEORY C.2, C.3).
#pragma once

#include "pursuit_tile.h"

namespace {

constexpr int64_t kPile = 4 * kLanes;       // scores whose maximum is kept together in a block selection
constexpr int64_t kCandidatesAPick = 8;     // row-disjoint picks are looked for among this many candidates each

struct Lane {
  Factor factor;
  Scale scale;
  float floor, enough, norm;
  int64_t rounds;
  int32_t* passed_over;  // features found dependent
  int64_t passed;
  bool live;
};

struct OmpScratch {
  float *target, *residual;  // (m, width)
  float *best, *scores;      // (width), and (kLanes, stride) for block selection
  int32_t* best_at;
  float* pile_max;
  int32_t *picks, *refused;
  uint8_t* row_taken;
  Lane* lanes;
  int64_t width, stride;
  size_t bytes;

  OmpScratch(const PursuitArgs& a, int groups, void* memory) {
    Arena arena{static_cast<char*>(memory)};
    width = static_cast<int64_t>(groups) * kLanes;
    stride = (a.n + kPile - 1) / kPile * kPile;
    target = arena.take<float>(a.m * width);
    residual = arena.take<float>(a.m * width);
    best = arena.take<float>(width);
    best_at = arena.take<int32_t>(width);
    scores = arena.take<float>(stride * kLanes);
    pile_max = arena.take<float>(padded(stride / kPile));
    picks = arena.take<int32_t>(a.block);
    refused = arena.take<int32_t>(a.block);
    row_taken = arena.take<uint8_t>(a.m);
    lanes = arena.take<Lane>(width);
    for (int64_t l = 0; l < width; ++l) {
      Factor factor;
      factor.place(arena, a);
      int32_t* const passed_over = arena.take<int32_t>(a.n);
      if (memory == nullptr) continue;
      lanes[l].factor = factor;
      lanes[l].factor.initialise();
      lanes[l].passed_over = passed_over;
      lanes[l].passed = 0;
      lanes[l].rounds = 0;
      lanes[l].live = false;
    }
    if (memory != nullptr) std::memset(row_taken, 0, static_cast<size_t>(a.m));
    bytes = arena.at;
  }
};

size_t omp_scratch_bytes(const PursuitArgs& a, int groups) { return OmpScratch(a, groups, nullptr).bytes; }

// For every sample of the tile the first of the features with the largest score. offsets = rows * width.
template <int kGroups, bool kPositive>
void best_features(
    const float* r, const int32_t* offsets, const float* values, int64_t n, int64_t d, float* best, int32_t* best_at) {
  VF top[kGroups];
  VI at[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    top[g] = splat(-1.0f);
    at[g] = VI{};
  }
  for (int64_t j = 0; j < n; ++j) {
    const int32_t* place = offsets + j * d;
    const float* value = values + j * d;
    VF total[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) total[g] = VF{};
    for (int64_t t = 0; t < d; ++t) {
      const float* p = r + place[t];
      const VF x = splat(value[t]);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) total[g] += x * load(p + g * kLanes);
    }
    const VI index = splat(static_cast<int32_t>(j));
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const VF score = kPositive ? total[g] : absolute(total[g]);
      const VI better = score > top[g];
      top[g] = better ? score : top[g];
      at[g] = better ? index : at[g];
    }
  }
  for (int g = 0; g < kGroups; ++g) {
    store(best + g * kLanes, top[g]);
    store(best_at + g * kLanes, at[g]);
  }
}

// Scores of one sample, largest first: piles of scores under their maxima, which may be stale (too large) and are mended
// when they come up.
class Picker {
 public:
  Picker(float* scores, float* pile_max, int64_t stride) : scores_(scores), pile_max_(pile_max), piles_(stride / kPile) {
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
      int64_t pile = 0;
      while (pile_max_[pile] != largest) ++pile;
      const float really = largest_in(pile);
      if (really < largest) {
        pile_max_[pile] = really;
        continue;
      }
      int64_t j = pile * kPile;
      while (scores_[j] != largest) ++j;
      scores_[j] = -1.0f;
      return static_cast<int32_t>(j);
    }
  }

 private:
  float largest_in(int64_t pile) const {
    VF best = splat(-1.0f);
    for (int64_t i = 0; i < kPile; i += kLanes) best = greater_of(load(scores_ + pile * kPile + i), best);
    return max_lanes(best);
  }

  float *scores_, *pile_max_;
  int64_t piles_;
};

void prepare_scores(const PursuitArgs& a, const Lane& lane, float* scores, int64_t stride) {
  if (!a.positive) {
    for (int64_t j = 0; j < stride; j += kLanes) store(scores + j, absolute(load(scores + j)));
  }
  for (int64_t j = a.n; j < stride; ++j) scores[j] = -1.0f;
  for (int64_t s = 0; s < lane.factor.count(); ++s) scores[lane.factor.features()[s]] = -1.0f;
  for (int64_t i = 0; i < lane.passed; ++i) scores[lane.passed_over[i]] = -1.0f;
}

// Up to `wanted` features into s.picks, best first.
int64_t pick_block(const PursuitArgs& a, OmpScratch& s, Picker& picker, float floor, int64_t wanted) {
  if (!a.disjoint) {
    int64_t count = 0;
    while (count < wanted) {
      const int32_t j = picker.pop(floor);
      if (j < 0) break;
      s.picks[count++] = j;
    }
    return count;
  }
  int64_t count = 0, refused = 0;
  for (int64_t seen = 0; seen < kCandidatesAPick * a.block && count < wanted; ++seen) {
    const int32_t j = picker.pop(floor);
    if (j < 0) break;
    const int32_t* rows = a.rows + j * a.d;
    uint8_t clash = 0;
    for (int64_t t = 0; t < a.d; ++t) clash |= s.row_taken[rows[t]];
    if (clash != 0) {
      if (refused < wanted) s.refused[refused++] = j;
      continue;
    }
    for (int64_t t = 0; t < a.d; ++t) s.row_taken[rows[t]] = 1;
    s.picks[count++] = j;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* rows = a.rows + s.picks[i] * a.d;
    for (int64_t t = 0; t < a.d; ++t) s.row_taken[rows[t]] = 0;
  }
  for (int64_t i = 0; i < refused && count < wanted; ++i) s.picks[count++] = s.refused[i];
  return count;
}

// One round of one sample whose scores stand in `scores`. Returns false when nothing could be taken.
bool take_block(const PursuitArgs& a, OmpScratch& s, Lane& lane, const float* r, float* scores) {
  prepare_scores(a, lane, scores, s.stride);
  Picker picker(scores, s.pile_max, s.stride);
  const int64_t before = lane.factor.count();
  const int64_t wanted = a.block < a.k - before ? a.block : a.k - before;
  const int64_t count = pick_block(a, s, picker, lane.floor, wanted);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t j = s.picks[i];
    if (!lane.factor.append(j, correlation(a, j, r, s.width))) lane.passed_over[lane.passed++] = j;
  }
  lane.factor.settle(before);
  return count > 0;
}

// One round with block = 1 of a sample whose best feature is of no use: next best, until one is independent.
bool take_next_best(const PursuitArgs& a, OmpScratch& s, Lane& lane, const float* r) {
  for (int64_t j = 0; j < a.n; ++j) s.scores[j] = correlation(a, static_cast<int32_t>(j), r, s.width);
  prepare_scores(a, lane, s.scores, s.stride);
  Picker picker(s.scores, s.pile_max, s.stride);
  const int64_t before = lane.factor.count();
  for (;;) {
    const int32_t j = picker.pop(lane.floor);
    if (j < 0) return false;
    if (lane.factor.append(j, correlation(a, j, r, s.width))) {
      lane.factor.settle(before);
      return true;
    }
    lane.passed_over[lane.passed++] = j;
  }
}

void finish_round(const PursuitArgs& a, OmpScratch& s, int64_t l) {
  Lane& lane = s.lanes[l];
  ++lane.rounds;
  lane.factor.residual(s.target + l, s.residual + l, s.width);
  lane.norm = norm_of(s.residual + l, a.m, s.width);
  lane.live = lane.factor.count() < a.k && lane.norm > lane.enough;
}

template <int kGroups>
void single_round(const PursuitArgs& a, const int32_t* offsets, OmpScratch& s, int count) {
  if (a.positive) best_features<kGroups, true>(s.residual, offsets, a.values, a.n, a.d, s.best, s.best_at);
  else best_features<kGroups, false>(s.residual, offsets, a.values, a.n, a.d, s.best, s.best_at);
  for (int l = 0; l < count; ++l) {
    Lane& lane = s.lanes[l];
    if (!lane.live) continue;
    const float* r = s.residual + l;
    const int32_t j = s.best_at[l];
    bool taken = s.best[l] > lane.floor;
    if (taken) {
      const int64_t before = lane.factor.count();
      if (!lane.factor.holds(j) && lane.factor.append(j, correlation(a, j, r, s.width))) lane.factor.settle(before);
      else taken = take_next_best(a, s, lane, r);
    }
    if (taken) finish_round(a, s, l);
    else lane.live = false;
  }
}

void block_round(const PursuitArgs& a, const int32_t* offsets, OmpScratch& s, int count) {
  for (int first = 0; first < count; first += kLanes) {
    correlate_group(s.residual + first, offsets, a.values, a.n, a.d, s.stride, s.scores);
    for (int l = first; l < count && l < first + kLanes; ++l) {
      Lane& lane = s.lanes[l];
      if (!lane.live) continue;
      if (take_block(a, s, lane, s.residual + l, s.scores + (l - first) * s.stride)) finish_round(a, s, l);
      else lane.live = false;
    }
  }
}

void omp_tile(const PursuitArgs& a, const int32_t* offsets, int64_t first, int count, int groups, void* memory) {
  OmpScratch s(a, groups, memory);
  for (int64_t l = 0; l < s.width; ++l) {
    if (l >= count) {
      for (int64_t i = 0; i < a.m; ++i) s.target[i * s.width + l] = 0.0f;
      continue;
    }
    Lane& lane = s.lanes[l];
    lane.scale = load_sample(a.h + (first + l) * a.m, a.m, s.target + l, s.width);
    lane.norm = lane.scale.norm;
    lane.floor = kFloor * lane.scale.norm;
    lane.enough = enough_for(a, lane.scale);
    lane.live = lane.norm > lane.enough;
  }
  std::memcpy(s.residual, s.target, static_cast<size_t>(a.m * s.width) * sizeof(float));
  for (;;) {
    bool any = false;
    for (int l = 0; l < count; ++l) any |= s.lanes[l].live;
    if (!any) break;
    if (a.block > 1) block_round(a, offsets, s, count);
    else if (groups == 1) single_round<1>(a, offsets, s, count);
    else if (groups == 2) single_round<2>(a, offsets, s, count);
    else single_round<4>(a, offsets, s, count);
  }
  for (int l = 0; l < count; ++l) {
    Lane& lane = s.lanes[l];
    lane.factor.residual(s.target + l, s.residual + l, s.width);
    lane.factor.refine(s.residual + l, s.width);
    lane.factor.residual(s.target + l, s.residual + l, s.width);
    write_code(a, first + l, lane.scale, lane.factor.features(), lane.factor.coefficients(), lane.factor.count(),
               norm_of(s.residual + l, a.m, s.width), lane.rounds);
  }
}

}  // namespace
