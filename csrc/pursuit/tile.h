// What the pursuits share: scratch memory, reductions, samples brought in and scaled, correlations of all features with a
// group of samples, the code written out.
#pragma once

#include <cmath>

#include "pursuit/args.h"
#include "core/simd.h"

namespace {

using expander::PursuitArgs;

constexpr float kEpsilon = 1.1920929e-7f;
constexpr float kPivotFloor = 16 * kEpsilon;  // squared distance to the span below which a unit column is dependent
constexpr float kFloor = 32 * kEpsilon;       // correlations below this share of the sample's norm are rounding error

// Hands out pieces of one allocation on cache-line boundaries; with base == nullptr it only measures.
struct Arena {
  char* base;
  size_t at = 0;

  template <class T>
  T* take(int64_t count) {
    T* const piece = base != nullptr ? reinterpret_cast<T*>(base + at) : nullptr;
    at += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

EXPANDER_INLINE int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Bit l is set where lane l of a comparison holds.
EXPANDER_INLINE uint64_t mask_of(VI hit) {
#if defined(EXPANDER_AVX512)
  return _mm512_movepi32_mask(reinterpret_cast<const __m512i&>(hit));
#elif defined(EXPANDER_AVX2)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<const __m256&>(hit)));
#else
  uint64_t mask = 0;
  for (int l = 0; l < kLanes; ++l) mask |= static_cast<uint64_t>(hit[l] != 0) << l;
  return mask;
#endif
}

// The first i with p[i] == x, which must be there before the end of its vector.
EXPANDER_INLINE int64_t first_equal(const float* p, float x) {
  for (int64_t i = 0;; i += kLanes) {
    const uint64_t mask = mask_of(load(p + i) == splat(x));
    if (mask != 0) return i + __builtin_ctzll(mask);
  }
}

template <int kXor>
EXPANDER_INLINE VF swap_floats(VF v) {
#define EXPANDER_PICK(l) (((l) ^ kXor) % kLanes)
#if defined(__clang__)
  return __builtin_shufflevector(v, v, EXPANDER_LANES(EXPANDER_PICK));
#else
  return __builtin_shuffle(v, VI{EXPANDER_LANES(EXPANDER_PICK)});
#endif
#undef EXPANDER_PICK
}

// The greater; b where either is NaN. Spelt out, because compilers make a compare and a blend of a > b ? a : b.
EXPANDER_INLINE VF greater_of(VF a, VF b) {
#if defined(EXPANDER_AVX512)
  const __m512 r = _mm512_max_ps(reinterpret_cast<const __m512&>(a), reinterpret_cast<const __m512&>(b));
  return reinterpret_cast<const VF&>(r);
#elif defined(EXPANDER_AVX2)
  const __m256 r = _mm256_max_ps(reinterpret_cast<const __m256&>(a), reinterpret_cast<const __m256&>(b));
  return reinterpret_cast<const VF&>(r);
#elif defined(__SSE__)
  const __m128 r = _mm_max_ps(reinterpret_cast<const __m128&>(a), reinterpret_cast<const __m128&>(b));
  return reinterpret_cast<const VF&>(r);
#else
  return a > b ? a : b;
#endif
}

template <int kWidth = kLanes / 2>
EXPANDER_INLINE float sum_lanes(VF v) {
  v += swap_floats<kWidth>(v);
  if constexpr (kWidth > 1) return sum_lanes<kWidth / 2>(v);
  else return v[0];
}

template <int kWidth = kLanes / 2>
EXPANDER_INLINE float max_lanes(VF v) {
  v = greater_of(v, swap_floats<kWidth>(v));
  if constexpr (kWidth > 1) return max_lanes<kWidth / 2>(v);
  else return v[0];
}

struct Scale {
  int exponent;  // the sample was multiplied by 2^-exponent
  float norm;    // after that
  bool finite;
};

// out = h * 2^-exponent with the largest magnitude in [1/2, 1); zeros for a sample that is not finite.
EXPANDER_INLINE Scale load_sample(const float* h, int64_t m, float* out) {
  const VI magnitude = splat(0x7fffffff);
  VI peaks = VI{};
  int64_t i = 0;
  for (; i + kLanes <= m; i += kLanes) {
    const VI bits = as_int(load(h + i)) & magnitude;  // magnitudes order like their bits; infinities and NaN come last
    peaks = bits > peaks ? bits : peaks;
  }
  int32_t peak = 0;
  for (; i < m; ++i) {
    const auto bits = static_cast<int32_t>(float_to_bits(h[i]) & 0x7fffffffu);
    peak = bits > peak ? bits : peak;
  }
  for (int l = 0; l < kLanes; ++l) peak = peaks[l] > peak ? peaks[l] : peak;

  Scale scale{0, 0.0f, peak < 0x7f800000};
  if (!scale.finite) {
    std::memset(out, 0, static_cast<size_t>(m) * sizeof(float));
    return scale;
  }
  std::frexp(bits_to_float(static_cast<uint32_t>(peak)), &scale.exponent);
  // In two steps, because 2^-exponent itself may not be a float.
  const int half = -scale.exponent / 2;
  const float first = std::ldexp(1.0f, half), second = std::ldexp(1.0f, -scale.exponent - half);
  VF squares = VF{};
  for (i = 0; i + kLanes <= m; i += kLanes) {
    const VF x = load(h + i) * first * second;
    squares += x * x;
    store(out + i, x);
  }
  float rest = 0.0f;
  for (; i < m; ++i) {
    out[i] = h[i] * first * second;
    rest += out[i] * out[i];
  }
  scale.norm = std::sqrt(sum_lanes(squares) + rest);
  return scale;
}

EXPANDER_INLINE float norm_of(const float* r, int64_t m) {
  VF squares[2] = {VF{}, VF{}};
  int64_t i = 0;
  for (; i + 2 * kLanes <= m; i += 2 * kLanes) {
    squares[0] += load(r + i) * load(r + i);
    squares[1] += load(r + i + kLanes) * load(r + i + kLanes);
  }
  float rest = 0.0f;
  for (; i < m; ++i) rest += r[i] * r[i];
  return std::sqrt(sum_lanes(squares[0] + squares[1]) + rest);
}

EXPANDER_INLINE float enough_for(const PursuitArgs& a, const Scale& scale) {
  return a.tol < 0.0f ? kFloor * scale.norm : a.tol * scale.norm;
}

// tile[i * width + base + l] = rows[l * m + i] for the kLanes samples of a group; null rows are zero.
EXPANDER_INLINE void to_tile(const float* const* rows, int64_t m, int64_t width, float* tile) {
  int64_t i = 0;
  for (; i + kLanes <= m; i += kLanes) {
    VF block[kLanes];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) block[l] = rows[l] != nullptr ? load(rows[l] + i) : VF{};
    transpose(block);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) store(tile + (i + l) * width, block[l]);
  }
  for (; i < m; ++i) {
    for (int l = 0; l < kLanes; ++l) tile[i * width + l] = rows[l] != nullptr ? rows[l][i] : 0.0f;
  }
}

// <w_feature, r> with entry i of r at r[i * step].
EXPANDER_INLINE float correlation(const PursuitArgs& a, int32_t feature, const float* r, int64_t step) {
  const int32_t* rows = a.rows + feature * a.d;
  const float* values = a.values + feature * a.d;
  float total = 0.0f;
  for (int64_t t = 0; t < a.d; ++t) total += values[t] * r[rows[t] * step];
  return total;
}

// Calls work.template operator()<D>() with D = degree for the small degrees, whose loops are then unrolled, else D = 0.
template <class Work>
EXPANDER_INLINE void by_degree(int64_t degree, const Work& work) {
  switch (degree) {
    case 4: return work.template run<4>();
    case 5: return work.template run<5>();
    case 6: return work.template run<6>();
    case 7: return work.template run<7>();
    case 8: return work.template run<8>();
    case 10: return work.template run<10>();
    case 16: return work.template run<16>();
    default: return work.template run<0>();
  }
}

// scores[lane * stride + j] = <w_j, r_lane>, or its magnitude, for the kLanes samples of a group; r[i * width + lane],
// offsets = rows * width.
struct CorrelateGroup {
  const float* r;
  const int32_t* offsets;
  const float* values;
  int64_t n, degree, stride;
  float* scores;
  bool magnitude;

  template <int kDegree>
  void run() const {
    const int64_t d = kDegree > 0 ? kDegree : degree;
    const VI keep = splat(magnitude ? 0x7fffffff : -1);
    for (int64_t j = 0; j < n; j += kLanes) {
      VF block[kLanes];
      const int columns = n - j < kLanes ? static_cast<int>(n - j) : kLanes;
      for (int c = 0; c < kLanes; ++c) {
        VF total = VF{};
        if (c < columns) {
          const int32_t* at = offsets + (j + c) * d;
          const float* value = values + (j + c) * d;
#pragma GCC unroll 16
          for (int64_t t = 0; t < d; ++t) total += splat(value[t]) * load(r + at[t]);
        }
        block[c] = as_float(as_int(total) & keep);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) store(scores + lane * stride + j, block[lane]);
    }
  }
};

EXPANDER_INLINE void write_code(
    const PursuitArgs& a, int64_t sample, const Scale& scale, const int32_t* features, const float* x, int64_t used,
    float residual, int64_t rounds) {
  const double back = std::ldexp(1.0, scale.exponent);
  int32_t* indices = a.indices + sample * a.k;
  float* code = a.code + sample * a.k;
  for (int64_t s = 0; s < used; ++s) {
    indices[s] = features[s];
    code[s] = static_cast<float>(x[s] * back / a.norms[features[s]]);
  }
  a.residual_norms[sample] = static_cast<float>(residual * back);
  a.iterations[sample] = static_cast<int32_t>(rounds);
  a.used[sample] = scale.finite ? static_cast<int32_t>(used) : -1;
}

}  // namespace
