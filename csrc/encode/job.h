// One tile of samples against a range of features: a unit of work of the encoder.
#pragma once

#include "core/args.h"

namespace expander {

// Where a selection job puts its result when the features are split among threads.
struct Partial {
  int64_t* keys;   // sample b writes its best keys (see select.h) to keys[b * stride, b * stride + width)
  int64_t stride;
  int64_t width;
};

// One tile of samples against a range of features.
struct EncodeJob {
  const EncodeArgs* args;
  const int64_t* samples;  // sample numbers, or null for first, first + 1, ...
  int64_t first;
  int count;        // samples in this tile, at most 16 * vectors
  int64_t begin;    // features [begin, end)
  int64_t end;
  bool safe;        // no estimated threshold: always succeeds
  Partial partial;  // keys == nullptr: write the finished code
  void* scratch;
  int64_t* failed;  // room for `count`; receives the samples whose estimated threshold was too high
};

}  // namespace expander
