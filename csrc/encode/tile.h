// A tile of samples, transposed: coordinate i of its kTile samples lies in kTile consecutive floats.
#pragma once

#include "core/args.h"
#include "core/simd.h"

namespace {

// tile[i * width + lane] = h[sample(lane), i] - center[i]; lanes without a sample are not read. Whether h is finite there.
template <class Float>
bool load_tile(
    const void* h, const float* center, const int64_t* samples, int64_t first, int count, int64_t m, int width,
    float* tile) {
  using T = typename Float::type;
  VF zeros[4] = {};  // sums of 0 · h: NaN where an entry is NaN or infinite
  float zero = 0;
  for (int base = 0; base < width; base += kLanes) {
    const T* row[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int lane = base + l;
      row[l] = lane >= count ? nullptr
                             : static_cast<const T*>(h) + (samples != nullptr ? samples[lane] : first + lane) * m;
    }
    int64_t i = 0;
    for (; i + kLanes <= m; i += kLanes) {
      VF r[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) r[l] = row[l] != nullptr ? Float::load_lanes(row[l] + i) : VF{};
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) zeros[l % 4] += r[l] * splat(0.0f);
      if (center != nullptr) {
        const VF c = load(center + i);
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) r[l] -= c;
      }
      transpose(r);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) store(tile + (i + l) * width + base, r[l]);
    }
    for (; i < m; ++i) {
      const float c = center != nullptr ? center[i] : 0.0f;
      for (int l = 0; l < kLanes; ++l) {
        const float x = row[l] != nullptr ? Float::load(row[l][i]) : 0.0f;
        zero += x * 0.0f;
        tile[i * width + base + l] = row[l] != nullptr ? x - c : 0.0f;
      }
    }
  }
  const VF sum = (zeros[0] + zeros[1]) + (zeros[2] + zeros[3]);
  for (int l = 0; l < kLanes; ++l) zero += sum[l];
  return zero == 0.0f;
}

EXPANDER_INLINE bool load_tile(
    expander::DType dtype, const void* h, const float* center, const int64_t* samples, int64_t first, int count,
    int64_t m, int width, float* tile) {
  switch (dtype) {
    case expander::DType::bf16: return load_tile<BF16>(h, center, samples, first, count, m, width, tile);
    case expander::DType::f16: return load_tile<F16>(h, center, samples, first, count, m, width, tile);
    default: return load_tile<F32>(h, center, samples, first, count, m, width, tile);
  }
}

// acc[v] = bias + sum_t values[t] * tile[rows[t]], 16 * kVectors samples at once: contiguous loads, no gather.
template <int kVectors>
EXPANDER_INLINE void scores(
    const float* tile, const int32_t* rows, const float* values, int64_t d, float bias, VF (&acc)[kVectors]) {
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) acc[v] = splat(bias);
  for (int64_t t = 0; t < d; ++t) {
    const float* p = tile + static_cast<int64_t>(rows[t]) * (kVectors * kLanes);
    const VF x = splat(values[t]);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[v] += x * load(p + v * kLanes);
  }
}

}  // namespace
