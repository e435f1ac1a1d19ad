// Orthogonal matching pursuit on a tile of samples side by side: every round correlates all features with all residuals,
// contiguous loads and no gather; supports and their least squares are kept sample by sample (docs/theory.md S2, S3).
#pragma once

#include "pursuit/factor.h"
#include "pursuit/picker.h"

namespace {

constexpr int64_t kCandidatesAPick = 8;  // a row-disjoint round looks at this many features for each one it takes

struct Lane {
  Factor factor;
  Scale scale;
  float floor, enough;
  int64_t rounds;
  uint64_t* passed_over;  // features found dependent, a bit each
  bool passed, live;
};

EXPANDER_INLINE void pass_over(Lane& lane, int32_t feature) {
  lane.passed_over[feature / 64] |= uint64_t{1} << feature % 64;
  lane.passed = true;
}

EXPANDER_INLINE bool passed_over(const Lane& lane, int32_t feature) {
  return lane.passed && (lane.passed_over[feature / 64] >> feature % 64 & 1) != 0;
}

struct OmpScratch {
  float *target, *residual;  // (m, width)
  float *best, *norm;        // (width)
  int32_t* best_at;
  float* scores;             // (kLanes, stride); one sample's for block = 1
  float* pile_max;
  float* sample;             // (kLanes, m)
  int32_t *picks, *refused, *kept;
  float* old;
  uint8_t* row_taken;
  Lane* lanes;
  int64_t width, stride;
  size_t bytes;

  OmpScratch(const PursuitArgs& a, int groups, void* memory) {
    Arena arena{static_cast<char*>(memory)};
    width = static_cast<int64_t>(groups) * kLanes;
    const int64_t piles = (a.n + kPile - 1) / kPile;
    stride = piles * kPile + kLanes;  // an odd number of cache lines: samples do not share cache sets
    target = arena.take<float>(a.m * width);
    residual = arena.take<float>(a.m * width);
    best = arena.take<float>(width);
    norm = arena.take<float>(width);
    best_at = arena.take<int32_t>(width);
    scores = arena.take<float>(a.block > 1 ? stride * kLanes : stride);
    pile_max = arena.take<float>(padded(piles));
    sample = arena.take<float>(a.m * kLanes);
    picks = arena.take<int32_t>(a.block);
    refused = arena.take<int32_t>(a.block);
    kept = arena.take<int32_t>(padded(a.k));
    old = arena.take<float>(padded(a.k));
    row_taken = arena.take<uint8_t>(a.m);
    lanes = arena.take<Lane>(width);
    for (int64_t l = 0; l < width; ++l) {
      Factor factor;
      factor.place(arena, a);
      auto* const passed_over = arena.take<uint64_t>((a.n + 63) / 64);
      if (memory == nullptr) continue;
      factor.initialise();
      std::memset(passed_over, 0, static_cast<size_t>((a.n + 63) / 64) * sizeof(uint64_t));
      lanes[l] = Lane{factor, Scale{0, 0.0f, true}, 0.0f, 0.0f, 0, passed_over, false, false};
    }
    if (memory != nullptr) std::memset(row_taken, 0, static_cast<size_t>(a.m));
    bytes = arena.at;
  }
};

size_t omp_scratch_bytes(const PursuitArgs& a, int groups) { return OmpScratch(a, groups, nullptr).bytes; }

// For every sample of the tile the first of the features with the largest score. offsets = rows * width.
template <int kGroups>
struct BestFeatures {
  const float* r;
  const int32_t* offsets;
  const float* values;
  int64_t n, degree;
  bool positive;
  float* best;
  int32_t* best_at;

  template <int kDegree>
  void run() const {
    const int64_t d = kDegree > 0 ? kDegree : degree;
    const VI magnitude = splat(positive ? -1 : 0x7fffffff);
    VF top[kGroups];
    VI at[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      top[g] = splat(-1.0f);
      at[g] = VI{};
    }
    VI index = VI{};
    for (int64_t j = 0; j < n; ++j) {
      const int32_t* place = offsets + j * d;
      const float* value = values + j * d;
      VF total[kGroups];
      for (int g = 0; g < kGroups; ++g) total[g] = VF{};
#pragma GCC unroll 16
      for (int64_t t = 0; t < d; ++t) {
        const float* p = r + place[t];
        const VF x = splat(value[t]);
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) total[g] += x * load(p + g * kLanes);
      }
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        const VF score = as_float(as_int(total[g]) & magnitude);
        const VI better = score > top[g];
        top[g] = better ? score : top[g];
        at[g] = better ? index : at[g];
      }
      index += 1;
    }
    for (int g = 0; g < kGroups; ++g) {
      store(best + g * kLanes, top[g]);
      store(best_at + g * kLanes, at[g]);
    }
  }
};

void leave_out(const PursuitArgs& a, const Lane& lane, float* scores) {
  const Support& support = lane.factor.support;
  for (int64_t s = 0; s < support.count(); ++s) scores[support.features()[s]] = -1.0f;
  if (!lane.passed) return;
  for (int64_t word = 0; word < (a.n + 63) / 64; ++word) {
    for (uint64_t bits = lane.passed_over[word]; bits != 0; bits &= bits - 1) scores[word * 64 + __builtin_ctzll(bits)] = -1.0f;
  }
}

// Up to `wanted` features into s.picks, best first.
int64_t pick_block(const PursuitArgs& a, OmpScratch& s, Picker& picker, float floor, int64_t wanted) {
  int64_t count = 0, refused = 0;
  if (!a.disjoint) {
    for (; count < wanted; ++count) {
      const int32_t j = picker.pop(floor);
      if (j < 0) break;
      s.picks[count] = j;
    }
    return count;
  }
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

// After a column was added to the feasible coefficients s.old: least squares under x >= 0 by dropping columns, the inner
// loop of Lawson & Hanson (1974). Few samples need it in few rounds, so the factor is simply built anew.
void keep_positive(const PursuitArgs& a, OmpScratch& s, int64_t l) {
  Factor& factor = s.lanes[l].factor;
  for (;;) {
    const float* x = factor.coefficients();
    const int32_t* features = factor.support.features();
    float step = 1.0f;
    bool leaving = false;
    for (int64_t i = 0; i < factor.count(); ++i) {
      if (x[i] > 0.0f) continue;
      leaving = true;
      const float ratio = s.old[i] > 0.0f ? s.old[i] / (s.old[i] - x[i]) : 0.0f;
      step = ratio < step ? ratio : step;
    }
    if (!leaving) return;
    int64_t kept = 0;
    for (int64_t i = 0; i < factor.count(); ++i) {
      const float ratio = s.old[i] > 0.0f ? s.old[i] / (s.old[i] - x[i]) : 0.0f;
      if (x[i] <= 0.0f && ratio <= step) continue;
      s.kept[kept] = features[i];
      s.old[kept++] = s.old[i] + step * (x[i] - s.old[i]);
    }
    factor.clear();
    int64_t built = 0;
    for (int64_t i = 0; i < kept; ++i) {
      s.old[built] = s.old[i];
      built += factor.append(s.kept[i], correlation(a, s.kept[i], s.target + l, s.width));
    }
    factor.settle(0);
  }
}

// Adds feature j, whose correlation with the residual is c; false (and never again) if it depends on the support.
bool take(const PursuitArgs& a, OmpScratch& s, int64_t l, int32_t j, float c) {
  Lane& lane = s.lanes[l];
  const int64_t before = lane.factor.count();
  if (a.nonnegative) {
    for (int64_t i = 0; i < before; ++i) s.old[i] = lane.factor.coefficients()[i];
    s.old[before] = 0.0f;
  }
  if (!lane.factor.append(j, c)) {
    pass_over(lane, j);
    return false;
  }
  lane.factor.settle(before);
  if (a.nonnegative) {
    keep_positive(a, s, l);
    if (!lane.factor.support.holds(j)) pass_over(lane, j);  // rounding alone made it look useful
  }
  return true;
}

void update_residual(const PursuitArgs& a, OmpScratch& s, int64_t l) {
  for (int64_t i = 0; i < a.m; ++i) s.residual[i * s.width + l] = s.target[i * s.width + l];
  s.lanes[l].factor.support.subtract(s.lanes[l].factor.coefficients(), s.residual + l, s.width);
}

// One round of one sample whose scores stand in `scores`. Returns false when nothing could be taken.
bool take_block(const PursuitArgs& a, OmpScratch& s, int64_t l, float* scores) {
  Lane& lane = s.lanes[l];
  const float* r = s.residual + l;
  leave_out(a, lane, scores);
  Picker picker(scores, s.pile_max, a.n);
  const int64_t before = lane.factor.count();
  const int64_t wanted = a.block < a.k - before ? a.block : a.k - before;
  const int64_t count = pick_block(a, s, picker, lane.floor, wanted);
  if (a.nonnegative) {
    for (int64_t i = 0; i < count && lane.factor.count() < a.k; ++i) {
      if (i > 0) update_residual(a, s, l);
      // Earlier columns of this block may have explained what this one promised.
      const float c = correlation(a, s.picks[i], r, s.width);
      if (c > lane.floor) take(a, s, l, s.picks[i], c);
    }
    return count > 0;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int32_t j = s.picks[i];
    if (!lane.factor.append(j, correlation(a, j, r, s.width))) pass_over(lane, j);
  }
  lane.factor.settle(before);
  return count > 0;
}

// One round with block = 1 of a sample whose best feature is of no use: next best, until one is independent.
bool take_next_best(const PursuitArgs& a, OmpScratch& s, int64_t l) {
  const float* r = s.residual + l;
  for (int64_t j = 0; j < a.n; ++j) {
    const float c = correlation(a, static_cast<int32_t>(j), r, s.width);
    s.scores[j] = a.positive ? c : std::fabs(c);
  }
  leave_out(a, s.lanes[l], s.scores);
  Picker picker(s.scores, s.pile_max, a.n);
  for (;;) {
    const int32_t j = picker.pop(s.lanes[l].floor);
    if (j < 0) return false;
    if (take(a, s, l, j, correlation(a, j, r, s.width))) return true;
  }
}

template <int kGroups>
void single_round(const PursuitArgs& a, const int32_t* offsets, OmpScratch& s, int count) {
  by_degree(a.d, BestFeatures<kGroups>{s.residual, offsets, a.values, a.n, a.d, a.positive, s.best, s.best_at});
  for (int l = 0; l < count; ++l) {
    Lane& lane = s.lanes[l];
    if (!lane.live) continue;
    const int32_t j = s.best_at[l];
    lane.live = s.best[l] > lane.floor;
    if (!lane.live) continue;
    const bool known = lane.factor.support.holds(j) || passed_over(lane, j);
    if (known || !take(a, s, l, j, correlation(a, j, s.residual + l, s.width))) lane.live = take_next_best(a, s, l);
    lane.rounds += lane.live;
  }
}

void block_round(const PursuitArgs& a, const int32_t* offsets, OmpScratch& s, int count) {
  for (int first = 0; first < count; first += kLanes) {
    by_degree(a.d, CorrelateGroup{s.residual + first, offsets, a.values, a.n, a.d, s.stride, s.scores, !a.positive});
    for (int l = first; l < count && l < first + kLanes; ++l) {
      Lane& lane = s.lanes[l];
      if (!lane.live) continue;
      lane.live = take_block(a, s, l, s.scores + (l - first) * s.stride);
      lane.rounds += lane.live;
    }
  }
}

// residual = target - W x and its norm, for every sample.
void update_residuals(const PursuitArgs& a, OmpScratch& s, int count) {
  std::memcpy(s.residual, s.target, static_cast<size_t>(a.m * s.width) * sizeof(float));
  for (int l = 0; l < count; ++l) {
    s.lanes[l].factor.support.subtract(s.lanes[l].factor.coefficients(), s.residual + l, s.width);
  }
  for (int64_t base = 0; base < s.width; base += kLanes) {
    VF squares[4] = {VF{}, VF{}, VF{}, VF{}};
    for (int64_t i = 0; i < a.m; ++i) {
      const VF x = load(s.residual + i * s.width + base);
      squares[i % 4] += x * x;
    }
    const VF total = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    for (int l = 0; l < kLanes; ++l) s.norm[base + l] = std::sqrt(total[l]);
  }
}

void omp_tile(const PursuitArgs& a, const int32_t* offsets, int64_t first, int count, int groups, void* memory) {
  OmpScratch s(a, groups, memory);
  for (int64_t base = 0; base < s.width; base += kLanes) {
    const float* rows[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      rows[l] = nullptr;
      if (base + l >= count) continue;
      Lane& lane = s.lanes[base + l];
      float* const sample = s.sample + l * a.m;
      rows[l] = sample;
      lane.scale = load_sample(a.h + (first + base + l) * a.m, a.m, sample);
      lane.floor = kFloor * lane.scale.norm;
      lane.enough = enough_for(a, lane.scale);
      lane.live = lane.scale.norm > lane.enough;
    }
    to_tile(rows, a.m, s.width, s.target + base);
  }
  std::memcpy(s.residual, s.target, static_cast<size_t>(a.m * s.width) * sizeof(float));
  for (;;) {
    bool any = false;
    for (int l = 0; l < count; ++l) any |= s.lanes[l].live;
    if (!any) break;
    if (a.block > 1) block_round(a, offsets, s, count);
    else if (groups == 1) single_round<1>(a, offsets, s, count);
    else single_round<2>(a, offsets, s, count);
    update_residuals(a, s, count);
    for (int l = 0; l < count; ++l) {
      Lane& lane = s.lanes[l];
      lane.live = lane.live && lane.factor.count() < a.k && s.norm[l] > lane.enough;
      // Dropping columns makes for more rounds than columns; Lawson & Hanson's cap.
      lane.live = lane.live && lane.rounds < 3 * a.k;
    }
  }
  if (!a.nonnegative) {  // a refinement could leave x >= 0
    for (int l = 0; l < count; ++l) s.lanes[l].factor.refine(s.residual + l, s.width);
  }
  update_residuals(a, s, count);
  for (int l = 0; l < count; ++l) {
    const Lane& lane = s.lanes[l];
    write_code(a, first + l, lane.scale, lane.factor.support.features(), lane.factor.coefficients(), lane.factor.count(),
               s.norm[l], lane.rounds);
  }
}

}  // namespace
