// Correlate a tile of samples with a range of features and keep each sample's k best, never storing all scores.
//
// A feature's scores for the whole tile are a few vectors. They are compared with one threshold a sample; the few that
// pass are appended to that sample's list of candidates. The threshold is estimated: first from the group maxima of the
// features visited first, then, as more features are seen, from the candidates themselves. Features are visited in blocks
// spread evenly over the index range, so what was seen stands for the rest. An estimate only decides how many candidates
// there are: a list that overflows is cut to its exact k best, and a sample that an estimate left with fewer than k
// candidates is reported and done again in `safe` mode, which uses exact thresholds only. The result never depends on an
// estimate. A threshold of the caller's is where every lane starts: what it refuses is never listed.
#pragma once

#include <cmath>

#include "encode/job.h"
#include "encode/layout.h"
#include "encode/select.h"
#include "core/simd.h"
#include "encode/tile.h"
#include "encode/write.h"

namespace {

using expander::EncodeJob;

#if defined(EXPANDER_AVX512)
alignas(64) const uint8_t kLaneNumbers[64] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
    32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
#endif

template <int kVectors, bool kMagnitude>
class TileEncoder {
 public:
  static constexpr int kWidth = kVectors * kLanes;

  explicit TileEncoder(const EncodeJob& job) : job_(job), a_(*job.args) {
    const Layout at = encode_layout(a_, kWidth);
    auto* base = static_cast<char*>(job.scratch);
    tile_ = reinterpret_cast<float*>(base + at.tile);
    scores_ = reinterpret_cast<float*>(base + at.scores);
    block_ = reinterpret_cast<float*>(base + at.block);
    passed_lane_ = reinterpret_cast<uint8_t*>(base + at.passed);
    passed_feature_ = passed_lane_ + kBlock * kWidth + 64;
    stream_z_ = reinterpret_cast<float*>(base + at.stream_z);
    stream_tag_ = reinterpret_cast<int32_t*>(base + at.stream_tag);
    stream_lane_ = reinterpret_cast<uint8_t*>(base + at.stream_lane);
    list_scores_ = reinterpret_cast<int32_t*>(base + at.list_scores);
    list_tags_ = reinterpret_cast<int32_t*>(base + at.list_tags);
    keys_ = reinterpret_cast<int64_t*>(base + at.keys);
    features_ = job.end - job.begin;
    keep_ = a_.k < features_ ? a_.k : features_;
    limit_ = list_limit(keep_, features_);
    room_ = list_room(a_.k, a_.n);
    lanes_ = job.count == 64 ? ~uint64_t{0} : (uint64_t{1} << job.count) - 1;
    given_ = a_.thresholded() ? lowest_above(a_.threshold) : -INFINITY;
    given_floor_ = a_.thresholded() ? ordered(given_) : INT32_MIN;
  }

  int run() {
    const bool finite = load_tile(
        a_.dtype, a_.h, static_cast<const float*>(a_.center), job_.samples, job_.first, job_.count, a_.m, kWidth, tile_);
    if (a_.infinite != nullptr && !finite) a_.infinite->store(true, std::memory_order_relaxed);
    for (int lane = 0; lane < kWidth; ++lane) {
      size_[lane] = 0;
      threshold_[lane] = given_;
      floor_[lane] = given_floor_;
    }
    // Blocks are visited in runs of neighbours (long only where there are very many, to spare page walks), the runs in
    // strides that spread every prefix of the visits over the index range.
    const int64_t blocks = (features_ + kBlock - 1) / kBlock;
    const int64_t run = blocks >= kManyBlocks ? kRun : 1;
    const int64_t runs = (blocks + run - 1) / run;
    const int64_t stride = spread(runs);
    const auto block_start = [&](int64_t visit, int64_t i) {
      return job_.begin + (visit * stride % runs * run + i) * kBlock;
    };

    // The first estimate is taken from the first block of each of the first runs.
    const int group = job_.safe ? 0 : group_blocks();
    int64_t seen = 0;
    if (group > 0) {
      for (int g = 0; g < group; ++g) store_block(block_start(g, 0), scores_ + int64_t{g} * kBlock * kWidth);
      first_threshold(group);
      for (int g = 0; g < group; ++g) {
        append_stored_block(block_start(g, 0), scores_ + int64_t{g} * kBlock * kWidth);
        seen += block_size(block_start(g, 0));
      }
    }
    int64_t next_look = seen > 0 ? seen * 2 : features_;
    for (int64_t visit = 0; visit < runs; ++visit) {
      for (int64_t i = visit < group ? 1 : 0; i < run; ++i) {
        const int64_t start = block_start(visit, i);
        if (start >= job_.end) break;
        const int64_t next = i + 1 < run ? start + kBlock : block_start(visit + 1, 0);
        fetch_block(next < job_.end ? next : job_.begin);
        append_block(start);
        seen += block_size(start);
        if (seen >= next_look) {
          next_look = seen * 2;
          if (seen * 4 <= features_ * 3) raise_thresholds(seen);
        }
      }
    }
    return finish();
  }

 private:
  int block_size(int64_t start) const {
    return static_cast<int>(job_.end - start < kBlock ? job_.end - start : kBlock);
  }

  // The dictionary's part of a block visited later: the order of visits is one that no hardware prefetcher foresees.
  EXPANDER_INLINE void fetch_block(int64_t start) const {
    const int64_t at = start * a_.d;
    int64_t bytes = block_size(start) * a_.d * 4;
    bytes = bytes < kFetchBytes ? bytes : kFetchBytes;
    const char* rows = reinterpret_cast<const char*>(a_.rows + at);
    const char* values = reinterpret_cast<const char*>(static_cast<const float*>(a_.values) + at);
    for (int64_t i = 0; i < bytes; i += 64) {
      __builtin_prefetch(rows + i);
      __builtin_prefetch(values + i);
    }
  }

  // Blocks in the first sample; 0: too few features, or k too large a share, for an estimate to pay.
  int group_blocks() const {
    for (int group = kMaxGroup; group >= 2; group /= 2) {
      if (features_ >= int64_t{3} * group * kBlock && group_rank(group) < kBlock - 1) return group;
    }
    return 0;
  }

  // Which of the 32 maxima of `group` scores has a tail as heavy as the share of candidates we want.
  int group_rank(int group) const {
    const int64_t seen = int64_t{group} * kBlock;
    const double tail = static_cast<double>(wanted(keep_, seen, features_)) / static_cast<double>(seen);
    if (tail >= 1.0) return kBlock;
    return static_cast<int>(std::ceil(kBlock * (1.0 - std::pow(1.0 - tail, group))));
  }

  // The scores of `size` features from `start` on, feature f at z + f * kWidth; each is handed to then(f, scores).
  // Everything the loop needs is held in locals: the compiler cannot know that the stores leave the members alone.
  template <class Then>
  EXPANDER_INLINE void score_block(int64_t start, int size, float* z, Then then) const {
    const int64_t d = a_.d;
    const float* const tile = tile_;
    const int32_t* rows = a_.rows + start * d;
    const float* values = static_cast<const float*>(a_.values) + start * d;
    const float* const bias = a_.b_enc != nullptr ? static_cast<const float*>(a_.b_enc) + start : nullptr;
    for (int f = 0; f < size; ++f, rows += d, values += d, z += kWidth) {
      VF acc[kVectors];
      scores<kVectors>(tile, rows, values, d, bias != nullptr ? bias[f] : 0.0f, acc);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) store(z + v * kLanes, acc[v]);
      then(f, acc);
    }
  }

  // All scores of a block, for the first estimate; a short block is filled up with scores that rank last.
  void store_block(int64_t start, float* z) {
    const int size = block_size(start);
    score_block(start, size, z, [](int, VF(&)[kVectors]) {});
    for (int i = size * kWidth; i < kBlock * kWidth; ++i) z[i] = kMagnitude ? 0.0f : -INFINITY;
  }

  __attribute__((noinline)) void append_block(int64_t start) {
    VF threshold[kVectors];
    for (int v = 0; v < kVectors; ++v) threshold[v] = load(threshold_ + v * kLanes);
    uint8_t* const lane = passed_lane_;
    uint8_t* const feature = passed_feature_;
    const uint64_t lanes = lanes_;
    int64_t passed = 0;
    score_block(start, block_size(start), block_, [&](int f, VF(&acc)[kVectors]) {
      passed += pass(acc, threshold, lanes, f, lane + passed, feature + passed);
    });
    collect(start, block_, passed);
  }

  void append_stored_block(int64_t start, const float* z) {
    VF threshold[kVectors];
    for (int v = 0; v < kVectors; ++v) threshold[v] = load(threshold_ + v * kLanes);
    const int size = block_size(start);
    int64_t passed = 0;
    for (int f = 0; f < size; ++f) {
      VF acc[kVectors];
      for (int v = 0; v < kVectors; ++v) acc[v] = load(z + f * kWidth + v * kLanes);
      passed += pass(acc, threshold, lanes_, f, passed_lane_ + passed, passed_feature_ + passed);
    }
    collect(start, z, passed);
  }

  // Notes the lanes of feature f at or above their threshold, if possible without a branch: whether a score passes cannot
  // be predicted, and a misprediction also stops the loads that run ahead. Returns how many there are.
  static EXPANDER_INLINE int64_t pass(
      VF (&acc)[kVectors], const VF (&threshold)[kVectors], uint64_t lanes, int f, uint8_t* to_lane, uint8_t* to_feature) {
    if constexpr (kMagnitude) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) acc[v] = absolute(acc[v]);
    }
    uint64_t mask = not_less(acc, threshold) & lanes;  // a lane without a sample collects nothing
    const int count = popcount(mask);
#if defined(EXPANDER_AVX512)
    const __m512i numbers = _mm512_load_si512(kLaneNumbers);
    _mm512_storeu_si512(to_lane, _mm512_maskz_compress_epi8(mask, numbers));
    _mm512_storeu_si512(to_feature, _mm512_set1_epi8(static_cast<char>(f)));
#else
    for (; mask != 0; mask &= mask - 1) {
      *to_lane++ = static_cast<uint8_t>(__builtin_ctzll(mask));
      *to_feature++ = static_cast<uint8_t>(f);
    }
#endif
    return count;
  }

  // Moves the candidates of a block, whose scores are still near, to the stream.
  EXPANDER_INLINE void collect(int64_t start, const float* z, int64_t passed) {
    const uint32_t first_tag = tag_of(static_cast<int32_t>(start));
    const uint8_t* __restrict lane = passed_lane_;
    const uint8_t* __restrict feature = passed_feature_;
    float* __restrict to_z = stream_z_ + stream_size_;
    int32_t* __restrict to_tag = stream_tag_ + stream_size_;
    uint8_t* __restrict to_lane = stream_lane_ + stream_size_;
    for (int64_t i = 0; i < passed; ++i) {
      const uint32_t l = lane[i], f = feature[i];
      to_z[i] = z[f * kWidth + l];
      to_tag[i] = static_cast<int32_t>(first_tag - 2 * f);
      to_lane[i] = static_cast<uint8_t>(l);
    }
    stream_size_ += static_cast<int>(passed);
    if (stream_size_ >= kStream) distribute();
  }

  // Moves the stream to the lists of its lanes.
  __attribute__((noinline)) void distribute() {
    int32_t* const score = reinterpret_cast<int32_t*>(stream_z_);
    for (int i = 0; i < stream_size_; i += kLanes) {
      const VF z = load(stream_z_ + i);
      if constexpr (kMagnitude) {
        for (int l = 0; l < kLanes && i + l < stream_size_; ++l) stream_tag_[i + l] |= z[l] < 0;
      }
      store(score + i, ordered(kMagnitude ? absolute(z) : z));
    }
    const int32_t* __restrict tag = stream_tag_;
    const uint8_t* __restrict lanes = stream_lane_;
    int32_t* const list_scores = list_scores_;
    int32_t* const list_tags = list_tags_;
    const int64_t room = room_;
    const auto limit = static_cast<int32_t>(limit_);
    const int count = stream_size_;
    for (int i = 0; i < count; ++i) {
      const int lane = lanes[i];
      const int32_t size = size_[lane];
      list_scores[lane * room + size] = score[i];
      list_tags[lane * room + size] = tag[i];
      size_[lane] = size + 1;
      if (__builtin_expect(size >= limit, 0)) cut(lane);
    }
    stream_size_ = 0;
  }

  // The threshold of each lane from the scores of the first blocks: feature f of every block belongs to group f, and the
  // rank-th largest group maximum is the estimate.
  void first_threshold(int group) {
    const int rank = group_rank(group);
    for (int v = 0; v < kVectors; ++v) {
      VF best[kBlock];
      for (int f = 0; f < kBlock; ++f) best[f] = splat(-INFINITY);
      for (int g = 0; g < group; ++g) {
        const float* z = scores_ + int64_t{g} * kBlock * kWidth + v * kLanes;
        for (int f = 0; f < kBlock; ++f) {
          const VF x = kMagnitude ? absolute(load(z + f * kWidth)) : load(z + f * kWidth);
          best[f] = x > best[f] ? x : best[f];
        }
      }
      // Batcher's odd-even merge sort of the 32 rows, descending, every lane for itself.
      for (int p = 1; p < kBlock; p *= 2) {
        for (int q = p; q >= 1; q /= 2) {
          for (int j = q % p; j + q < kBlock; j += 2 * q) {
            for (int i = 0; i < q && i + j + q < kBlock; ++i) {
              if ((i + j) / (2 * p) == (i + j + q) / (2 * p)) {
                const VF x = best[i + j], y = best[i + j + q];
                best[i + j] = x > y ? x : y;
                best[i + j + q] = x > y ? y : x;
              }
            }
          }
        }
      }
      for (int l = 0; l < kLanes; ++l) {
        const int lane = v * kLanes + l;
        if (lane >= job_.count) continue;
        threshold_[lane] = best[rank - 1][l] > given_ ? best[rank - 1][l] : given_;
        floor_[lane] = ordered(threshold_[lane]);
      }
    }
  }

  // NaN admits everything as a threshold, so +inf is the highest: it lets NaN and +inf through.
  void set_threshold(int lane, int32_t edge) {
    floor_[lane] = edge < kOrderedInf ? edge : kOrderedInf;
    threshold_[lane] = unordered(floor_[lane]);
  }

  // Drops candidates that more than enough others beat, judged by the share of the features seen.
  void raise_thresholds(int64_t seen) {
    distribute();
    const int want = wanted(keep_, seen, features_);
    for (int lane = 0; lane < job_.count; ++lane) {
      if (size_[lane] <= want + want / 4 + 4) continue;
      int32_t* const score = list_scores_ + lane * room_;
      set_threshold(lane, find_edge(score, size_[lane], want, want + want / 8 + 2, floor_[lane]));
      size_[lane] = keep_from(score, list_tags_ + lane * room_, size_[lane], floor_[lane]);
    }
  }

  // The k best candidates of a full list, exactly; the worst of them becomes the threshold.
  void cut(int lane) {
    int32_t* const score = list_scores_ + lane * room_;
    int32_t* const tag = list_tags_ + lane * room_;
    make_keys(score, tag, size_[lane]);
    keep_largest(keys_, size_[lane], keep_);
    int32_t edge = INT32_MAX;
    for (int64_t i = 0; i < keep_; ++i) {
      score[i] = key_score(keys_[i]);
      tag[i] = key_tag(keys_[i]);
      edge = score[i] < edge ? score[i] : edge;
    }
    size_[lane] = static_cast<int32_t>(keep_);
    set_threshold(lane, edge);
  }

  void make_keys(const int32_t* score, const int32_t* tag, int64_t size) {
    for (int64_t i = 0; i < size; ++i) keys_[i] = make_key(score[i], tag[i]);
  }

  int finish() {
    distribute();
    int failed = 0;
    for (int lane = 0; lane < job_.count; ++lane) {
      const int64_t sample = job_.samples != nullptr ? job_.samples[lane] : job_.first + lane;
      if (size_[lane] < keep_ && floor_[lane] > given_floor_) {
        job_.failed[failed++] = sample;
        continue;
      }
      int32_t* const score = list_scores_ + lane * room_;
      int32_t* const tag = list_tags_ + lane * room_;
      int size = size_[lane];
      if (size > keep_) {
        const int keep = static_cast<int>(keep_);
        size = keep_from(score, tag, size, find_edge(score, size, keep, keep, floor_[lane]));
      }
      make_keys(score, tag, size);
      keep_largest(keys_, size, keep_);  // more than k only when equal scores straddle the edge
      const int64_t kept = size < keep_ ? size : keep_;
      sort_descending(keys_, kept);
      if (job_.partial.keys != nullptr) {
        int64_t* out = job_.partial.keys + sample * job_.partial.stride;
        for (int64_t i = 0; i < job_.partial.width; ++i) out[i] = i < kept ? keys_[i] : kLowestKey;
      } else {
        write_code<kMagnitude>(a_, keys_, kept, sample);
      }
    }
    return failed;
  }

 private:
  const EncodeJob& job_;
  const EncodeArgs& a_;
  float* tile_;
  float* scores_;
  float* block_;
  uint8_t* passed_lane_;
  uint8_t* passed_feature_;
  float* stream_z_;
  int32_t* stream_tag_;
  uint8_t* stream_lane_;
  int stream_size_ = 0;
  int32_t* list_scores_;
  int32_t* list_tags_;
  int64_t* keys_;
  int64_t features_, keep_, limit_, room_;
  float given_;  // the lowest score that the caller's threshold lets through, and its order
  int32_t given_floor_;
  uint64_t lanes_;
  alignas(64) int32_t size_[kWidth];
  alignas(64) float threshold_[kWidth];
  int32_t floor_[kWidth];
};

}  // namespace
