// Incremental matching pursuit: taking column j changes the correlations only of the about n d^2 / m columns that share
// one of its rows, found through W by rows (THEORY C.1). One least-squares refit at the end.
#pragma once

#include "pursuit_tile.h"

namespace {

using expander::ByRow;

constexpr int64_t kChunk = 16 * kLanes;  // correlations whose maximum is kept together

struct MatchingScratch {
  float* tile;         // (m, kLanes)
  float* correlations; // (kLanes, stride)
  float* chunk_max;    // (stride / kChunk, kLanes)
  float* target;       // (m)
  float* residual;     // (m)
  float* x;
  int32_t* features;
  Factor factor;
  int64_t stride;
  size_t bytes;

  MatchingScratch(const PursuitArgs& a, void* memory) {
    Arena arena{static_cast<char*>(memory)};
    stride = (a.n + kChunk - 1) / kChunk * kChunk;
    tile = arena.take<float>(a.m * kLanes);
    correlations = arena.take<float>(stride * kLanes);
    chunk_max = arena.take<float>(stride / kChunk * kLanes);
    target = arena.take<float>(a.m);
    residual = arena.take<float>(a.m);
    x = arena.take<float>(padded(a.k));
    features = arena.take<int32_t>(padded(a.k));
    factor.place(arena, a);
    bytes = arena.at;
  }
};

size_t matching_scratch_bytes(const PursuitArgs& a) { return MatchingScratch(a, nullptr).bytes; }

// The first of the largest scores; NaN entries are out of the running. Returns the score, -1 if nothing is left.
template <bool kPositive>
float first_largest(const float* c, int64_t stride, float* chunk_max, int64_t& where) {
  VF best = splat(-1.0f);
  for (int64_t chunk = 0; chunk < stride / kChunk; ++chunk) {
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
  for (int64_t chunk = 0;; ++chunk) {
    if (not_less(load(chunk_max + chunk * kLanes), edge) == 0) continue;
    const float* p = c + chunk * kChunk;
    for (int64_t i = 0;; ++i) {
      if ((kPositive ? p[i] : std::fabs(p[i])) == largest) {
        where = chunk * kChunk + i;
        return largest;
      }
    }
  }
}

// c[column] -= step * W[row, column] for the columns of a row. By hand: compilers choose scatters, which are slower.
EXPANDER_INLINE void subtract_row(const ByRow& w, int32_t row, float step, float* c) {
  constexpr int kAtOnce = 8;
  const int32_t* column = w.column + w.start[row];
  const float* value = w.value + w.start[row];
  const int64_t count = w.start[row + 1] - w.start[row];
  int64_t e = 0;
  for (; e + kAtOnce <= count; e += kAtOnce) {
    float updated[kAtOnce];
#pragma GCC unroll 8
    for (int u = 0; u < kAtOnce; ++u) updated[u] = c[column[e + u]] - step * value[e + u];
#pragma GCC unroll 8
    for (int u = 0; u < kAtOnce; ++u) c[column[e + u]] = updated[u];
  }
  for (; e < count; ++e) c[column[e]] -= step * value[e];
}

template <bool kPositive>
void match_sample(const PursuitArgs& a, const ByRow& w, MatchingScratch& s, float* c, const Scale& scale, int64_t sample) {
  const float nan = __builtin_nanf("");
  const float floor = kFloor * scale.norm, enough = enough_for(a, scale);
  for (int64_t j = a.n; j < s.stride; ++j) c[j] = nan;
  std::memcpy(s.residual, s.target, static_cast<size_t>(a.m) * sizeof(float));
  int64_t used = 0, rounds = 0;
  float norm = scale.norm;
  while (rounds < a.k && norm > enough) {
    int64_t j = 0;
    if (!(first_largest<kPositive>(c, s.stride, s.chunk_max, j) > floor)) break;
    const float amount = c[j];
    int64_t slot = used;
    if (a.reselect) {
      for (slot = 0; slot < used && s.features[slot] != j; ++slot) {
      }
    }
    if (slot == used) {
      s.features[used] = static_cast<int32_t>(j);
      s.x[used++] = amount;
    } else {
      s.x[slot] += amount;
    }
    const int32_t* rows = a.rows + j * a.d;
    const float* values = a.values + j * a.d;
    for (int64_t t = 0; t < a.d; ++t) {
      const float step = amount * values[t];
      s.residual[rows[t]] -= step;
      subtract_row(w, rows[t], step, c);
    }
    if (!a.reselect) c[j] = nan;
    ++rounds;
    norm = norm_of(s.residual, a.m, 1);
  }
  if (a.refit) {
    s.factor.clear();
    for (int64_t i = 0; i < used; ++i) s.factor.append(s.features[i], 0.0f);
    used = s.factor.count();
    s.factor.refine(s.target, 1);
    s.factor.residual(s.target, s.residual, 1);
    s.factor.refine(s.residual, 1);
    s.factor.residual(s.target, s.residual, 1);
    norm = norm_of(s.residual, a.m, 1);
    write_code(a, sample, scale, s.factor.features(), s.factor.coefficients(), used, norm, rounds);
    return;
  }
  write_code(a, sample, scale, s.features, s.x, used, norm, rounds);
}

void matching_tile(const PursuitArgs& a, const ByRow& w, const int32_t* offsets, int64_t first, int count, void* memory) {
  MatchingScratch s(a, memory);
  s.factor.initialise();
  Scale scale[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lane < count) {
      scale[lane] = load_sample(a.h + (first + lane) * a.m, a.m, s.tile + lane, kLanes);
    } else {
      for (int64_t i = 0; i < a.m; ++i) s.tile[i * kLanes + lane] = 0.0f;
    }
  }
  correlate_group(s.tile, offsets, a.values, a.n, a.d, s.stride, s.correlations);
  for (int lane = 0; lane < count; ++lane) {
    for (int64_t i = 0; i < a.m; ++i) s.target[i] = s.tile[i * kLanes + lane];
    float* const c = s.correlations + lane * s.stride;
    if (a.positive) match_sample<true>(a, w, s, c, scale[lane], first + lane);
    else match_sample<false>(a, w, s, c, scale[lane], first + lane);
  }
}

}  // namespace
