// How encode.h works through features and where a tile's buffers lie in its scratch.
#pragma once

#include <cmath>

#include "core/args.h"
#include "encode/select.h"

namespace {

using expander::EncodeArgs;

constexpr int kBlock = 32;     // features between two looks at the lists
constexpr int64_t kManyBlocks = 8192, kRun = 8;
constexpr int64_t kFetchBytes = 4096;  // of rows and of values, fetched ahead
constexpr int kStream = 2048;  // candidates of a tile kept in order of arrival before they go to their lanes' lists
constexpr int kMaxGroup = 16;  // blocks in the first sample: 32 group maxima of up to 16 features each

EXPANDER_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Entries a list of candidates may hold before it is cut, and its room.
EXPANDER_INLINE int64_t list_limit(int64_t k, int64_t features) {
  const int64_t limit = 4 * k + 128;
  return limit < features ? limit : features;
}
EXPANDER_INLINE int64_t list_room(int64_t k, int64_t features) { return round_up(list_limit(k, features) + 1, 16); }

struct Layout {
  size_t tile, scores, block, passed, stream_z, stream_tag, stream_lane, list_scores, list_tags, keys, total;
};

EXPANDER_INLINE Layout encode_layout(const EncodeArgs& a, int width) {
  const auto align = [](int64_t bytes) { return static_cast<size_t>(round_up(bytes, 64) + 64); };
  const int64_t room = list_room(a.k, a.n);
  Layout at{};
  size_t used = 0;
  const auto take = [&](int64_t bytes) {
    const size_t here = used;
    used += align(bytes);
    return here;
  };
  at.tile = take(a.m * width * 4);
  at.scores = take(int64_t{kBlock} * kMaxGroup * width * 4);
  at.block = take(int64_t{kBlock} * width * 4);
  at.passed = take(2 * (int64_t{kBlock} * width + 64));
  at.stream_z = take((kStream + int64_t{kBlock} * width + kLanes) * 4);
  at.stream_tag = take((kStream + int64_t{kBlock} * width) * 4);
  at.stream_lane = take(kStream + int64_t{kBlock} * width);
  at.list_scores = take(room * width * 4);
  at.list_tags = take(room * width * 4);
  at.keys = take((sort_room(a.k) > room ? sort_room(a.k) : room) * 8);
  at.total = used;
  return at;
}

// A step coprime with `blocks`, near the golden section of it: every prefix of the visits covers the range evenly.
inline int64_t spread(int64_t blocks) {
  if (blocks < 3) return 1;
  for (auto step = static_cast<int64_t>(0.6180339887498949 * static_cast<double>(blocks));; ++step) {
    int64_t x = blocks, y = step;
    while (y != 0) {
      const int64_t r = x % y;
      x = y;
      y = r;
    }
    if (x == 1) return step % blocks;
  }
}

// How many candidates to expect to need among the first `seen` of `features`: the share of k plus a margin of three
// standard deviations, so that an underflow stays rare.
EXPANDER_INLINE int wanted(int64_t k, int64_t seen, int64_t features) {
  const double share = static_cast<double>(k) * static_cast<double>(seen) / static_cast<double>(features);
  const double want = share + 3.0 * std::sqrt(share) + 3.0;
  return want < static_cast<double>(k) ? static_cast<int>(want) : static_cast<int>(k);
}

}  // namespace
