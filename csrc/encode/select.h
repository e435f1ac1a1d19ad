// Exact selection of the k largest of a short list of candidates, without data-dependent branches.
//
// Scores are compared as integers: `ordered` maps a float to an int32 of the same order, with -0 = +0 and every NaN above
// +inf. A key is (ordered score, reversed index, sign), so that a descending sort of keys breaks ties to the lower index.
#pragma once

#include "core/simd.h"

namespace {

constexpr int32_t kOrderedInf = 0x7f800000;
constexpr int64_t kLowestKey = INT64_MIN;

EXPANDER_INLINE VI ordered(VF z) {
  const VI bits = as_int(z + 0.0f);  // -0 becomes +0
  const VI key = bits ^ ((bits >> 31) & 0x7fffffff);
  return (bits & 0x7fffffff) > kOrderedInf ? splat(INT32_MAX) : key;
}

EXPANDER_INLINE int32_t ordered(float z) { return ordered(splat(z))[0]; }

EXPANDER_INLINE float unordered(int32_t key) {
  return bits_to_float(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
}

// The lower half of a key: descending in the index, and the sign a magnitude has lost.
EXPANDER_INLINE uint32_t tag_of(int32_t index) { return static_cast<uint32_t>(INT32_MAX - index) << 1; }

EXPANDER_INLINE int64_t make_key(int32_t score, int32_t tag) {
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(score)) << 32 | static_cast<uint32_t>(tag));
}

EXPANDER_INLINE int32_t key_score(int64_t key) { return static_cast<int32_t>(key >> 32); }
EXPANDER_INLINE int32_t key_tag(int64_t key) { return static_cast<int32_t>(key); }
EXPANDER_INLINE int32_t key_index(int64_t key) {
  return INT32_MAX - static_cast<int32_t>(static_cast<uint32_t>(key) >> 1);
}

// How many of list[0, padded) are >= edge; padded is a multiple of the lanes.
EXPANDER_INLINE int count_from(const int32_t* list, int padded, int32_t edge) {
  const VI e = splat(edge);
  int total = 0;
  for (int i = 0; i < padded; i += kLanes) total += count_at_least(load(list + i), e);
  return total;
}

EXPANDER_INLINE int64_t count_from(const int64_t* list, int64_t padded, int64_t edge) {
  const VK e = edge - VK{};
  int64_t total = 0;
  for (int64_t i = 0; i < padded; i += kKeyLanes) total += count_at_least(load(list + i), e);
  return total;
}

// A score e with `least` <= |{list >= e}| <= `most`, or the least-th largest itself when ties leave no such score.
// `floor` is a score with at least `least` entries at or above it. list has room for whole vectors.
inline int32_t find_edge(int32_t* list, int size, int least, int most, int32_t floor) {
  int padded = size;
  while (padded % kLanes != 0) list[padded++] = INT32_MIN;
  VI top = splat(INT32_MIN);
  for (int i = 0; i < padded; i += kLanes) {
    const VI x = load(list + i);
    top = x > top ? x : top;
  }
  int32_t largest = top[0];
  for (int l = 1; l < kLanes; ++l) largest = top[l] > largest ? top[l] : largest;
  int64_t low = floor, high = static_cast<int64_t>(largest) + 1;  // count(low) >= least > count(high)
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const int found = count_from(list, padded, static_cast<int32_t>(middle));
    const bool enough = found >= least;  // selects, not branches: the outcome cannot be predicted
    low = enough ? middle : low;
    high = enough ? high : middle;
    if (enough & (found <= most)) break;
  }
  return static_cast<int32_t>(low);
}

// Keeps the entries of score >= edge, in their order; both lists have room for whole vectors. Returns how many.
inline int keep_from(int32_t* score, int32_t* tag, int size, int32_t edge) {
  int kept = 0, i = 0;
#if defined(EXPANDER_AVX512)
  for (; i + kLanes <= size; i += kLanes) {
    const VI s = load(score + i), t = load(tag + i);
    const __mmask16 mask = _mm512_cmpge_epi32_mask((__m512i)s, _mm512_set1_epi32(edge));
    // Whole vectors are written: what lies beyond `kept` up to i + kLanes has been read already.
    _mm512_storeu_si512(score + kept, _mm512_maskz_compress_epi32(mask, (__m512i)s));
    _mm512_storeu_si512(tag + kept, _mm512_maskz_compress_epi32(mask, (__m512i)t));
    kept += popcount(mask);
  }
#endif
  for (; i < size; ++i) {
    const int32_t s = score[i], t = tag[i];
    score[kept] = s;
    tag[kept] = t;
    kept += s >= edge;
  }
  return kept;
}

// Keeps the k largest of keys[0, count), in any order. keys has room up to a multiple of kKeyLanes.
inline void keep_largest(int64_t* keys, int64_t count, int64_t k) {
  if (count <= k) return;
  int64_t padded = count;
  while (padded % kKeyLanes != 0) keys[padded++] = kLowestKey;
  // The k-th largest key, bit by bit from the top (keys are distinct).
  uint64_t prefix = 0;
  for (int bit = 63; bit >= 0; --bit) {
    const uint64_t trial = prefix | uint64_t{1} << bit;
    const auto edge = static_cast<int64_t>(trial ^ uint64_t{1} << 63);
    const int64_t found = count_from(keys, padded, edge);
    if (found >= k) prefix = trial;
    if (found == k) break;
  }
  const auto edge = static_cast<int64_t>(prefix ^ uint64_t{1} << 63);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t key = keys[i];
    keys[kept] = key;
    kept += key >= edge;
    if (kept == k) break;
  }
}

// ------------------------------------------------------------------------------------------- descending sort

template <int kXor>
EXPANDER_INLINE VK sort_lanes(VK v) {
  // Lanes l and l ^ kXor: the lower lane takes the larger key. The highest bit of kXor tells which is the lower.
  constexpr int kTop = kXor & 4 ? 4 : (kXor & 2 ? 2 : 1);
  const VK w = swap_lanes<kXor>(v);
#if defined(EXPANDER_AVX512)
  constexpr int kUpper = kTop == 4 ? 0xf0 : (kTop == 2 ? 0xcc : 0xaa);
  __m512i r = _mm512_mask_min_epi64(
      (__m512i)larger(v, w), kUpper, (__m512i)(v),
      (__m512i)(w));
  return (VK)(r);
#else
  VK upper;
  for (int l = 0; l < kKeyLanes; ++l) upper[l] = (l & kTop) ? -1 : 0;
  return upper ? smaller(v, w) : larger(v, w);
#endif
}

EXPANDER_INLINE VK reverse_lanes(VK v) { return swap_lanes<kKeyLanes - 1>(v); }

// Sorts the lanes of a bitonic vector.
EXPANDER_INLINE VK finish_lanes(VK v) {
  if constexpr (kKeyLanes >= 8) v = sort_lanes<4>(v);
  if constexpr (kKeyLanes >= 4) v = sort_lanes<2>(v);
  return sort_lanes<1>(v);
}

EXPANDER_INLINE VK sort_vector(VK v) {
  v = sort_lanes<1>(v);
  if constexpr (kKeyLanes >= 4) v = sort_lanes<1>(sort_lanes<3>(v));
  if constexpr (kKeyLanes >= 8) v = sort_lanes<1>(sort_lanes<2>(sort_lanes<7>(v)));
  return v;
}

// Bitonic sort of `kVectors` vectors; every merge starts by comparing i with its mirror image, so all run one way.
template <int kVectors>
EXPANDER_INLINE void sort_vectors(VK* keys) {
#pragma GCC unroll 64
  for (int i = 0; i < kVectors; ++i) keys[i] = sort_vector(keys[i]);
#pragma GCC unroll 8
  for (int size = 2; size <= kVectors; size *= 2) {
#pragma GCC unroll 64
    for (int i = 0; i < kVectors; ++i) {
      const int j = i ^ (size - 1);
      if (i < j) {
        const VK a = keys[i], b = reverse_lanes(keys[j]);
        keys[i] = larger(a, b);
        keys[j] = smaller(a, b);
      }
    }
#pragma GCC unroll 8
    for (int stride = size / 4; stride >= 1; stride /= 2) {
#pragma GCC unroll 64
      for (int i = 0; i < kVectors; ++i) {
        if ((i & stride) == 0) {
          const VK a = keys[i], b = keys[i | stride];
          keys[i] = larger(a, b);
          keys[i | stride] = smaller(a, b);
        }
      }
    }
#pragma GCC unroll 64
    for (int i = 0; i < kVectors; ++i) keys[i] = finish_lanes(keys[i]);
  }
}

// The same for any power of two of vectors, in memory.
inline void sort_vectors_long(int64_t* keys, int64_t vectors) {
  const auto at = [keys](int64_t i) { return keys + i * kKeyLanes; };
  for (int64_t i = 0; i < vectors; ++i) store(at(i), sort_vector(load(at(i))));
  for (int64_t size = 2; size <= vectors; size *= 2) {
    for (int64_t base = 0; base < vectors; base += size) {
      for (int64_t i = 0; i < size / 2; ++i) {
        int64_t* const p = at(base + i);
        int64_t* const q = at(base + size - 1 - i);
        const VK a = load(p), b = reverse_lanes(load(q));
        store(p, larger(a, b));
        store(q, smaller(a, b));
      }
    }
    for (int64_t stride = size / 4; stride >= 1; stride /= 2) {
      for (int64_t base = 0; base < vectors; base += 2 * stride) {
        for (int64_t i = base; i < base + stride; ++i) {
          const VK a = load(at(i)), b = load(at(i + stride));
          store(at(i), larger(a, b));
          store(at(i + stride), smaller(a, b));
        }
      }
    }
    for (int64_t i = 0; i < vectors; ++i) store(at(i), finish_lanes(load(at(i))));
  }
}

template <int kVectors>
void sort_short(int64_t* keys) {
  VK v[kVectors];
#pragma GCC unroll 64
  for (int i = 0; i < kVectors; ++i) v[i] = load(keys + i * kKeyLanes);
  sort_vectors<kVectors>(v);
#pragma GCC unroll 64
  for (int i = 0; i < kVectors; ++i) store(keys + i * kKeyLanes, v[i]);
}

// Room sort_descending needs for k keys.
EXPANDER_INLINE int64_t sort_room(int64_t k) {
  int64_t room = kKeyLanes;
  while (room < k) room *= 2;
  return room;
}

// Sorts keys[0, count) in descending order; keys has room for sort_room(count).
inline void sort_descending(int64_t* keys, int64_t count) {
  const int64_t room = sort_room(count);
  for (int64_t i = count; i < room; ++i) keys[i] = kLowestKey;
  switch (room / kKeyLanes) {
    case 1: return sort_short<1>(keys);
    case 2: return sort_short<2>(keys);
    case 4: return sort_short<4>(keys);
    case 8: return sort_short<8>(keys);
    default: return sort_vectors_long(keys, room / kKeyLanes);
  }
}

}  // namespace
