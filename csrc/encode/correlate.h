// All scores of a tile of samples against a range of features, written out (B, n).
#pragma once

#include "core/args.h"
#include "core/simd.h"
#include "encode/tile.h"

namespace {

using expander::CorrelateArgs;

size_t correlate_scratch_bytes(const CorrelateArgs& a, int tile) { return static_cast<size_t>(a.m) * tile * 4 + 64; }

template <int kVectors, class Float>
void correlate_tile_of(
    const CorrelateArgs& a, int64_t first, int count, int64_t begin, int64_t end, void* scratch) {
  constexpr int kWidth = kVectors * kLanes;
  auto* const tile = static_cast<float*>(scratch);
  auto* const out = static_cast<typename Float::type*>(a.out);
  load_tile(a.dtype, a.h, nullptr, nullptr, first, count, a.m, kWidth, tile);
  alignas(64) float z[kLanes * kWidth];
  for (int64_t start = begin; start < end; start += kLanes) {
    const int size = static_cast<int>(end - start < kLanes ? end - start : kLanes);
    const int32_t* rows = a.rows + start * a.d;
    const float* values = static_cast<const float*>(a.values) + start * a.d;
    for (int f = 0; f < size; ++f) {
      VF acc[kVectors];
      scores<kVectors>(tile, rows + f * a.d, values + f * a.d, a.d, 0.0f, acc);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) store(z + f * kWidth + v * kLanes, acc[v]);
    }
    for (int v = 0; v < kVectors && v * kLanes < count; ++v) {
      VF r[kLanes];
#pragma GCC unroll 16
      for (int f = 0; f < kLanes; ++f) r[f] = f < size ? load(z + f * kWidth + v * kLanes) : VF{};
      transpose(r);
      for (int l = 0; l < kLanes && v * kLanes + l < count; ++l) {
        typename Float::type* const to = out + (first + v * kLanes + l) * a.n + start;
        if constexpr (sizeof(typename Float::type) == 4) {
          if (size == kLanes) {
            store(to, r[l]);
            continue;
          }
        }
        for (int f = 0; f < size; ++f) to[f] = Float::store(r[l][f]);
      }
    }
  }
}

template <class Float>
void correlate_tile_as(
    const CorrelateArgs& a, int64_t first, int count, int64_t begin, int64_t end, void* scratch, int tile) {
  if constexpr (kMaxTile >= 64) {
    if (tile == 64) return correlate_tile_of<64 / kLanes, Float>(a, first, count, begin, end, scratch);
  }
  if (tile == 32) return correlate_tile_of<32 / kLanes, Float>(a, first, count, begin, end, scratch);
  return correlate_tile_of<16 / kLanes, Float>(a, first, count, begin, end, scratch);
}

void correlate_tile(
    const CorrelateArgs& a, int64_t first, int count, int64_t begin, int64_t end, void* scratch, int tile) {
  switch (a.dtype) {
    case expander::DType::bf16: return correlate_tile_as<BF16>(a, first, count, begin, end, scratch, tile);
    case expander::DType::f16: return correlate_tile_as<F16>(a, first, count, begin, end, scratch, tile);
    default: return correlate_tile_as<F32>(a, first, count, begin, end, scratch, tile);
  }
}

}  // namespace
