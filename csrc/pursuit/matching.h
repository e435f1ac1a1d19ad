// Incremental matching pursuit: taking column j changes the correlations only of the about n d^2 / m columns that share
// one of its rows, found through W by rows (docs/theory.md S1). One least-squares refit at the end.
#pragma once

#include "pursuit/cholesky.h"

namespace {

using expander::ByRow;

constexpr int64_t kChunk = 16 * kLanes;  // correlations whose maximum is kept together

struct MatchingScratch {
  float* tile;          // (m, kLanes)
  float* correlations;  // (kLanes, stride)
  float* chunk_max;     // (chunks, kLanes)
  float* targets;       // (kLanes, m)
  float* residual;      // (m)
  float* x;
  int32_t* features;
  Support support;
  Cholesky cholesky;
  int64_t chunks, stride;
  size_t bytes;

  MatchingScratch(const PursuitArgs& a, void* memory) {
    Arena arena{static_cast<char*>(memory)};
    chunks = (a.n + kChunk - 1) / kChunk;
    // Room for the column that pads rows, and an odd number of cache lines, so that samples do not share cache sets.
    stride = chunks * kChunk + kLanes;
    tile = arena.take<float>(a.m * kLanes);
    correlations = arena.take<float>(stride * kLanes);
    chunk_max = arena.take<float>(chunks * kLanes);
    targets = arena.take<float>(a.m * kLanes);
    residual = arena.take<float>(a.m);
    x = arena.take<float>(padded(a.k));
    features = arena.take<int32_t>(padded(a.k));
    support.place(arena, a);
    cholesky.place(arena, a);
    bytes = arena.at;
  }
};

size_t matching_scratch_bytes(const PursuitArgs& a) { return MatchingScratch(a, nullptr).bytes; }

// The first of the largest scores; NaN entries are out of the running. Returns the score, -1 if nothing is left.
template <bool kPositive>
EXPANDER_INLINE float first_largest(const float* c, int64_t chunks, float* chunk_max, int64_t& where) {
  VF best = splat(-1.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const float* p = c + chunk * kChunk;
    VF top[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) top[u] = splat(-1.0f);
#pragma GCC unroll 16
    for (int v = 0; v < 16; ++v) {
      const VF x = load(p + v * kLanes);
      top[v % 4] = greater_of(kPositive ? x : absolute(x), top[v % 4]);
    }
    const VF all = greater_of(greater_of(top[0], top[1]), greater_of(top[2], top[3]));
    store(chunk_max + chunk * kLanes, all);
    best = greater_of(all, best);
  }
  const float largest = max_lanes(best);
  if (largest < 0.0f) return largest;
  const VF edge = splat(largest);
  int64_t chunk = 0;
  while (not_less(load(chunk_max + chunk * kLanes), edge) == 0) ++chunk;
  const float* p = c + chunk * kChunk;
  for (int64_t v = 0;; v += kLanes) {
    const VF x = load(p + v);
    const VI hit = (kPositive ? x : absolute(x)) == edge;
    const uint64_t mask = mask_of(hit);
    if (mask != 0) {
      where = chunk * kChunk + v + __builtin_ctzll(mask);
      return largest;
    }
  }
}

// c[column] -= step * W[row, column] for the columns of a row. By hand: compilers choose scatters, which are slower.
EXPANDER_INLINE void subtract_row(const ByRow& w, int32_t row, float step, float* c) {
  constexpr int kAtOnce = expander::kRowPadding;
  const int64_t end = w.start[row + 1];
  for (int64_t e = w.start[row]; e < end; e += kAtOnce) {
    const int32_t* column = w.column + e;
    const float* value = w.value + e;
    float updated[kAtOnce];
#pragma GCC unroll 16
    for (int u = 0; u < kAtOnce; ++u) updated[u] = c[column[u]] - step * value[u];
#pragma GCC unroll 16
    for (int u = 0; u < kAtOnce; ++u) c[column[u]] = updated[u];
  }
}

template <bool kPositive>
void match_sample(
    const PursuitArgs& a, const ByRow& w, MatchingScratch& s, const float* target, float* c, const Scale& scale,
    int64_t sample) {
  const float nan = __builtin_nanf("");
  const float floor = kFloor * scale.norm, enough = enough_for(a, scale);
  for (int64_t j = a.n; j < s.stride; ++j) c[j] = nan;
  std::memcpy(s.residual, target, static_cast<size_t>(a.m) * sizeof(float));
  int64_t used = 0, rounds = 0;
  float norm = scale.norm;
  while (rounds < a.k && norm > enough) {
    int64_t j = 0;
    if (!(first_largest<kPositive>(c, s.chunks, s.chunk_max, j) > floor)) break;
    const int32_t* rows = a.rows + j * a.d;
    const float* values = a.values + j * a.d;
    const float amount = c[j];
    for (int64_t t = 0; t < a.d; ++t) {
      const float step = amount * values[t];
      s.residual[rows[t]] -= step;
      subtract_row(w, rows[t], step, c);
    }
    int64_t slot = used;
    if (a.reselect) {
      for (slot = 0; slot < used && s.features[slot] != j; ++slot) {
      }
    } else {
      c[j] = nan;
    }
    if (slot == used) {
      s.features[used] = static_cast<int32_t>(j);
      s.x[used++] = amount;
    } else {
      s.x[slot] += amount;
    }
    ++rounds;
    norm = norm_of(s.residual, a.m);
  }
  if (a.refit) {
    s.cholesky.load_support(s.support, s.features, used);
    if (a.nonnegative) s.cholesky.solve_nonnegative(s.support, target, floor, s.x, s.residual, a.m);
    else s.cholesky.solve(s.support, target, s.x, s.residual, a.m);
    norm = norm_of(s.residual, a.m);
    s.support.clear();
    int64_t kept = 0;
    for (int64_t i = 0; i < used; ++i) {
      const bool keep = a.nonnegative ? s.x[i] > 0.0f : s.cholesky.taken(i);
      s.features[kept] = s.features[i];
      s.x[kept] = s.x[i];
      kept += keep;
    }
    used = kept;
  }
  write_code(a, sample, scale, s.features, s.x, used, norm, rounds);
}

void matching_tile(const PursuitArgs& a, const ByRow& w, const int32_t* offsets, int64_t first, int count, void* memory) {
  MatchingScratch s(a, memory);
  s.support.initialise();
  Scale scale[kLanes];
  const float* rows[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    rows[lane] = lane < count ? s.targets + lane * a.m : nullptr;
    if (lane < count) scale[lane] = load_sample(a.h + (first + lane) * a.m, a.m, s.targets + lane * a.m);
  }
  to_tile(rows, a.m, kLanes, s.tile);
  by_degree(a.d, CorrelateGroup{s.tile, offsets, a.values, a.n, a.d, s.stride, s.correlations, false});
  for (int lane = 0; lane < count; ++lane) {
    float* const c = s.correlations + lane * s.stride;
    if (a.positive) match_sample<true>(a, w, s, rows[lane], c, scale[lane], first + lane);
    else match_sample<false>(a, w, s, rows[lane], c, scale[lane], first + lane);
  }
}

}  // namespace
