// Operations on named features only: decode, correlations at a support, gradient of the values, Gram of a support.
//
// One sample at a time: its row of h (or of the output) stays in L1, the features' rows and values are fetched ahead.
// Each kernel returns false when it met an index or a row out of range, and touches nothing through it.
#pragma once

#include "core/args.h"
#include "core/simd.h"

namespace {

using expander::SparseArgs;

constexpr int kAhead = 8;  // features fetched ahead of their use

template <class Float>
struct Sum {
  using type = float;
};

struct F64 {
  using type = double;
  EXPANDER_INLINE static double load(type x) { return x; }
  EXPANDER_INLINE static type store(double x) { return x; }
};

template <>
struct Sum<F64> {
  using type = double;
};

EXPANDER_INLINE void fetch(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(p) + at);
}

template <class Value, class Args>
EXPANDER_INLINE void fetch_feature(const Args& a, int32_t feature) {
  if (static_cast<uint64_t>(static_cast<uint32_t>(feature)) >= static_cast<uint64_t>(a.n)) return;
  const int64_t at = static_cast<int64_t>(feature) * a.d, bytes = a.d * 4 < 256 ? a.d * 4 : 256;
  fetch(a.rows + at, bytes);
  if (a.values != nullptr) fetch(static_cast<const Value*>(a.values) + at, bytes);
}

// Whether the feature and its rows are in range.
template <class Args>
EXPANDER_INLINE bool valid(const Args& a, int32_t feature) {
  if (static_cast<uint64_t>(static_cast<uint32_t>(feature)) >= static_cast<uint64_t>(a.n)) return false;
  const int32_t* rows = a.rows + static_cast<int64_t>(feature) * a.d;
  uint32_t worst = 0;
  for (int64_t t = 0; t < a.d; ++t) {
    const auto row = static_cast<uint32_t>(rows[t]);
    worst = row > worst ? row : worst;
  }
  return static_cast<uint64_t>(worst) < static_cast<uint64_t>(a.m);
}

// visit(s, rows, values) for each of the k features at `index`, in order. False, and not visited: one out of range.
template <class S, class Args, class Visit>
EXPANDER_INLINE bool for_features(const Args& a, const int32_t* index, const Visit& visit) {
  bool good = true;
  for (int64_t s = 0; s < a.k; ++s) {
    if (s + kAhead < a.k) fetch_feature<S>(a, index[s + kAhead]);
    if (!valid(a, index[s])) {
      good = false;
      continue;
    }
    const int64_t at = static_cast<int64_t>(index[s]) * a.d;
    visit(s, a.rows + at, static_cast<const S*>(a.values) + at);
  }
  return good;
}

// Writes to `mine` which of the k features at `index` lie in [first, last); returns how many.
EXPANDER_INLINE int64_t features_between(int64_t first, int64_t last, const int32_t* index, int64_t k, int32_t* mine) {
  int64_t count = 0;
  for (int64_t s = 0; s < k; ++s) {
    mine[count] = static_cast<int32_t>(s);
    const int64_t feature = index[s];
    count += (feature >= first) & (feature < last);
  }
  return count;
}

// The rows of a feature, and its place in the gradient that will be added to.
template <class S, class Args>
EXPANDER_INLINE void fetch_gradient(const Args& a, const S* grad, int64_t feature) {
  const int64_t at = feature * a.d, bytes = a.d * 4 < 256 ? a.d * 4 : 256;
  fetch(a.rows + at, bytes);
  fetch(grad + at, bytes);
}

// out[b] = sum_s code[b, s] * w_{indices[b, s]}
template <class Float>
bool decode_as(const SparseArgs& a, int64_t begin, int64_t end, void* scratch) {
  using S = typename Sum<Float>::type;
  constexpr bool kDirect = sizeof(typename Float::type) == sizeof(S);
  bool good = true;
  for (int64_t b = begin; b < end; ++b) {
    auto* const out = static_cast<typename Float::type*>(a.out) + b * a.m;
    S* const row = kDirect ? reinterpret_cast<S*>(out) : static_cast<S*>(scratch);
    std::memset(row, 0, static_cast<size_t>(a.m) * sizeof(S));
    const int32_t* index = a.indices + b * a.k;
    const auto* code = static_cast<const typename Float::type*>(a.code) + b * a.k;
    good &= for_features<S>(a, index, [&](int64_t s, const int32_t* rows, const S* values) {
      const S x = Float::load(code[s]);
      for (int64_t t = 0; t < a.d; ++t) row[rows[t]] += x * values[t];
    });
    if constexpr (!kDirect) {
      for (int64_t i = 0; i < a.m; ++i) out[i] = Float::store(row[i]);
    }
  }
  return good;
}

// The row of h as sums are taken, converted once when it is 16 bits wide.
template <class Float, class Args>
EXPANDER_INLINE const typename Sum<Float>::type* wide_row(const Args& a, int64_t b, void* scratch) {
  using S = typename Sum<Float>::type;
  const auto* h = static_cast<const typename Float::type*>(a.h) + b * a.m;
  // The next row, whole: entries are picked at random, which no hardware prefetcher foresees.
  if (b + 1 < a.B) fetch(h + a.m, a.m * static_cast<int64_t>(sizeof(*h)));
  if constexpr (sizeof(typename Float::type) == sizeof(S)) {
    return reinterpret_cast<const S*>(h);
  } else {
    auto* const row = static_cast<float*>(scratch);
    int64_t i = 0;
    for (; i + kLanes <= a.m; i += kLanes) store(row + i, Float::load_lanes(h + i));
    for (; i < a.m; ++i) row[i] = Float::load(h[i]);
    return row;
  }
}

// out[b, s] = <w_{indices[b, s]}, h[b]>
template <class Float>
bool correlate_at_as(const SparseArgs& a, int64_t begin, int64_t end, void* scratch) {
  using S = typename Sum<Float>::type;
  bool good = true;
  for (int64_t b = begin; b < end; ++b) {
    const S* h = wide_row<Float>(a, b, scratch);
    const int32_t* index = a.indices + b * a.k;
    auto* const out = static_cast<typename Float::type*>(a.out) + b * a.k;
    good &= for_features<S>(a, index, [&](int64_t s, const int32_t* rows, const S* values) {
      S sum = 0;
      for (int64_t t = 0; t < a.d; ++t) sum += values[t] * h[rows[t]];
      out[s] = Float::store(sum);
    });
  }
  return good;
}

// out[j] = sum over (b, s) with indices[b, s] = j of code[b, s] * h[b, rows[j]], for j in [first, last): one thread owns
// a range of features and walks the samples in order, so a sum does not depend on how features are shared out.
template <class Float>
bool values_grad_as(const SparseArgs& a, int64_t first, int64_t last, void* scratch) {
  using S = typename Sum<Float>::type;
  bool good = true;
  S* const out = static_cast<S*>(a.out);
  auto* const mine = reinterpret_cast<int32_t*>(static_cast<char*>(scratch) + a.m * static_cast<int64_t>(sizeof(S)));
  std::memset(out + first * a.d, 0, static_cast<size_t>((last - first) * a.d) * sizeof(S));
  for (int64_t b = 0; b < a.B; ++b) {
    const int32_t* index = a.indices + b * a.k;
    const auto* code = static_cast<const typename Float::type*>(a.code) + b * a.k;
    for (int64_t s = 0; s < a.k; ++s) good &= (index[s] >= 0) & (index[s] < a.n);
    const int64_t count = features_between(first, last, index, a.k, mine);
    if (count == 0) continue;
    const S* h = wide_row<Float>(a, b, scratch);
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) fetch_gradient(a, out, index[mine[i + kAhead]]);
      const int32_t feature = index[mine[i]];
      if (!valid(a, feature)) {
        good = false;
        continue;
      }
      const int32_t* rows = a.rows + static_cast<int64_t>(feature) * a.d;
      S* const grad = out + static_cast<int64_t>(feature) * a.d;
      const S x = Float::load(code[mine[i]]);
      for (int64_t t = 0; t < a.d; ++t) grad[t] += x * h[rows[t]];
    }
  }
  return good;
}

// out[b, i, j] = <w_i, w_j> over the support of sample b: the entries are linked by row, and only pairs that share a row
// are multiplied, about k d (1 + k d / m) of them instead of k^2 d^2.
template <class Float>
bool gram_as(const SparseArgs& a, int64_t begin, int64_t end, void* scratch) {
  using S = typename Sum<Float>::type;
  constexpr bool kDirect = sizeof(typename Float::type) == sizeof(S);
  const int64_t entries = a.k * a.d, square = a.k * a.k;
  auto* base = static_cast<char*>(scratch);
  S* const value = reinterpret_cast<S*>(base);
  S* const buffer = value + entries;
  auto* const head = reinterpret_cast<int32_t*>(buffer + (kDirect ? 0 : square));
  auto* const next = head + a.m;
  auto* const slot = next + entries;
  bool good = true;
  for (int64_t i = 0; i < a.m; ++i) head[i] = -1;
  for (int64_t b = begin; b < end; ++b) {
    const int32_t* index = a.indices + b * a.k;
    auto* const out = static_cast<typename Float::type*>(a.out) + b * square;
    S* const sums = kDirect ? reinterpret_cast<S*>(out) : buffer;
    std::memset(sums, 0, static_cast<size_t>(square) * sizeof(S));
    int32_t used = 0;
    good &= for_features<S>(a, index, [&](int64_t s, const int32_t* rows, const S* values) {
      S square_norm = 0;
      for (int64_t t = 0; t < a.d; ++t) {
        const int32_t row = rows[t];
        const S x = values[t];
        square_norm += x * x;
        for (int32_t e = head[row]; e >= 0; e = next[e]) {
          const S product = x * value[e];
          sums[s * a.k + slot[e]] += product;
          sums[slot[e] * a.k + s] += product;
        }
        value[used] = x;
        slot[used] = static_cast<int32_t>(s);
        next[used] = head[row];
        head[row] = used++;
      }
      sums[s * a.k + s] += square_norm;
    });
    for (int64_t s = 0; s < a.k; ++s) {
      const int32_t feature = index[s];
      if (!good && !valid(a, feature)) continue;
      const int32_t* rows = a.rows + static_cast<int64_t>(feature) * a.d;
      for (int64_t t = 0; t < a.d; ++t) head[rows[t]] = -1;
    }
    if constexpr (!kDirect) {
      for (int64_t i = 0; i < square; ++i) out[i] = Float::store(sums[i]);
    }
  }
  return good;
}

size_t sparse_scratch_bytes(const SparseArgs& a, bool gram) {
  const int64_t wide = a.dtype == expander::DType::f64 ? 8 : 4;
  const int64_t bytes = gram ? a.k * a.k * wide + a.k * a.d * (wide + 8) + a.m * 4 : a.m * wide + a.k * 4;
  return static_cast<size_t>(bytes) + 64;
}

// The kernel `name` in the type of its data.
#define EXPANDER_AS_TYPE(name, ...)                                     \
  switch (a.dtype) {                                                    \
    case expander::DType::bf16: return name##_as<BF16>(a, __VA_ARGS__); \
    case expander::DType::f16: return name##_as<F16>(a, __VA_ARGS__);   \
    case expander::DType::f64: return name##_as<F64>(a, __VA_ARGS__);   \
    default: return name##_as<F32>(a, __VA_ARGS__);                     \
  }

bool decode(const SparseArgs& a, int64_t begin, int64_t end, void* scratch) {
  EXPANDER_AS_TYPE(decode, begin, end, scratch)
}
bool correlate_at(const SparseArgs& a, int64_t begin, int64_t end, void* scratch) {
  EXPANDER_AS_TYPE(correlate_at, begin, end, scratch)
}
bool values_grad(const SparseArgs& a, int64_t first, int64_t last, void* scratch) {
  EXPANDER_AS_TYPE(values_grad, first, last, scratch)
}
bool gram(const SparseArgs& a, int64_t begin, int64_t end, void* scratch) { EXPANDER_AS_TYPE(gram, begin, end, scratch) }

bool rows_in_range(const int32_t* rows, int64_t count, int64_t m) {
  VI low = VI{}, high = VI{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const VI x = load(rows + i);
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  bool good = true;
  for (int l = 0; l < kLanes; ++l) good &= low[l] >= 0 && (high[l] < m || high[l] == 0);
  for (; i < count; ++i) good &= rows[i] >= 0 && rows[i] < m;
  return good;
}

}  // namespace
