// The encoder on tiles of every width.
#pragma once

#include "encode/encode.h"

namespace {

template <int kVectors>
int encode_tile_of(const EncodeJob& job) {
  return job.args->magnitude ? TileEncoder<kVectors, true>(job).run() : TileEncoder<kVectors, false>(job).run();
}

int encode_tile(const EncodeJob& job, int tile) {
  if constexpr (kMaxTile >= 64) {
    if (tile == 64) return encode_tile_of<64 / kLanes>(job);
  }
  return tile == 32 ? encode_tile_of<32 / kLanes>(job) : encode_tile_of<16 / kLanes>(job);
}

// The widest tile that leaves every thread something to do and fits the second-level cache with room to spare.
int tile_width(int64_t samples_per_thread, int64_t m) {
  constexpr int64_t kTileBytes = 768 << 10;
  int tile = kMaxTile;
  while (tile > 16 && (samples_per_thread <= tile / 2 || m * tile * 4 > kTileBytes)) tile /= 2;
  return tile;
}

int64_t merge_room(int64_t count, int64_t k) {
  const int64_t padded = round_up(count, kKeyLanes);
  return sort_room(k) > padded ? sort_room(k) : padded;
}

size_t encode_scratch_bytes(const EncodeArgs& a, int tile) { return encode_layout(a, tile).total; }

// Joins the partial results of one sample (`count` keys in all) into its code; keys has room for merge_room.
void merge_partial(const EncodeArgs& a, int64_t* keys, int64_t count, int64_t sample) {
  int64_t kept = 0;  // without the places that a threshold left empty
  for (int64_t i = 0; i < count; ++i) {
    if (keys[i] != kLowestKey) keys[kept++] = keys[i];
  }
  keep_largest(keys, kept, a.k);
  kept = kept < a.k ? kept : a.k;
  sort_descending(keys, kept);
  if (a.magnitude) {
    write_code<true>(a, keys, kept, sample);
  } else {
    write_code<false>(a, keys, kept, sample);
  }
}

}  // namespace
