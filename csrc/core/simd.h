// Vectors of the instruction set this translation unit is compiled for, on the vector extensions of gcc and clang.
//
// Everything lives in an anonymous namespace: the same source is compiled once per instruction set, and a function with
// external linkage (a std:: template included) could be merged by the linker across those and run where it must not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VBMI2__)
#define EXPANDER_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define EXPANDER_AVX2 1
#endif

#define EXPANDER_INLINE inline __attribute__((always_inline))

namespace {

#if defined(EXPANDER_AVX512)
constexpr int kLanes = 16;
constexpr int kMaxTile = 64;
#elif defined(EXPANDER_AVX2)
constexpr int kLanes = 8;
constexpr int kMaxTile = 64;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kMaxTile = 64;
#else
constexpr int kLanes = 4;
constexpr int kMaxTile = 32;
#endif
constexpr int kKeyLanes = kLanes / 2;

typedef float VF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VI __attribute__((vector_size(kLanes * 4)));
typedef int64_t VK __attribute__((vector_size(kLanes * 4)));
typedef float VFu __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t VIu __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int64_t VKu __attribute__((vector_size(kLanes * 4), aligned(8), may_alias));

EXPANDER_INLINE VF load(const float* p) { return *reinterpret_cast<const VFu*>(p); }
EXPANDER_INLINE VI load(const int32_t* p) { return *reinterpret_cast<const VIu*>(p); }
EXPANDER_INLINE VK load(const int64_t* p) { return *reinterpret_cast<const VKu*>(p); }
EXPANDER_INLINE void store(float* p, VF v) { *reinterpret_cast<VFu*>(p) = v; }
EXPANDER_INLINE void store(int32_t* p, VI v) { *reinterpret_cast<VIu*>(p) = v; }
EXPANDER_INLINE void store(int64_t* p, VK v) { *reinterpret_cast<VKu*>(p) = v; }
EXPANDER_INLINE VF splat(float x) { return x - VF{}; }
EXPANDER_INLINE VI splat(int32_t x) { return x - VI{}; }
EXPANDER_INLINE VF as_float(VI v) { return (VF)(v); }
EXPANDER_INLINE VI as_int(VF v) { return (VI)(v); }
EXPANDER_INLINE VF absolute(VF v) { return as_float(as_int(v) & 0x7fffffff); }

// Bit l is set where a[l] >= b[l] or either is NaN.
EXPANDER_INLINE uint64_t not_less(VF a, VF b) {
#if defined(EXPANDER_AVX512)
  return _mm512_cmp_ps_mask((__m512)(a), (__m512)(b), _CMP_NLT_UQ);
#elif defined(EXPANDER_AVX2)
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps((__m256)(a), (__m256)(b), _CMP_NLT_UQ)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(
      _mm_movemask_ps(_mm_cmpnlt_ps((__m128)(a), (__m128)(b))));
#elif defined(__aarch64__)
  const VI bit = {1, 2, 4, 8};
  VI hit = ~(a < b) & bit;
  return static_cast<uint32_t>(vaddvq_s32((int32x4_t)(hit)));
#else
  const VI less = a < b;
  uint64_t mask = 0;
  for (int l = 0; l < kLanes; ++l) mask |= static_cast<uint64_t>(less[l] == 0) << l;
  return mask;
#endif
}

// Bit v * kLanes + l is set where a[v][l] >= b[v][l] or either is NaN.
template <int kVectors>
EXPANDER_INLINE uint64_t not_less(const VF (&a)[kVectors], const VF (&b)[kVectors]) {
#if defined(EXPANDER_AVX512)
  if constexpr (kVectors == 4) {  // joined in mask registers: a quarter of the moves
    const auto bits = [&](int v) { return static_cast<__mmask32>(not_less(a[v], b[v])); };
    return _mm512_kunpackd(_mm512_kunpackw(bits(3), bits(2)), _mm512_kunpackw(bits(1), bits(0)));
  }
#endif
  uint64_t mask = 0;
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) mask |= not_less(a[v], b[v]) << (v * kLanes);
  return mask;
}

EXPANDER_INLINE int popcount(uint64_t x) { return __builtin_popcountll(x); }

// How many lanes have a >= b.
EXPANDER_INLINE int count_at_least(VI a, VI b) {
#if defined(EXPANDER_AVX512)
  return popcount(_mm512_cmpge_epi32_mask((__m512i)a, (__m512i)b));
#elif defined(EXPANDER_AVX2)
  return popcount(static_cast<uint32_t>(_mm256_movemask_ps((__m256)(VI)(a >= b))));
#else
  const VI hit = a >= b;
  int total = 0;
  for (int l = 0; l < kLanes; ++l) total -= hit[l];
  return total;
#endif
}

EXPANDER_INLINE int count_at_least(VK a, VK b) {
#if defined(EXPANDER_AVX512)
  return popcount(_mm512_cmpge_epi64_mask((__m512i)a, (__m512i)b));
#else
  const VK hit = a >= b;
  int64_t total = 0;
  for (int l = 0; l < kKeyLanes; ++l) total -= hit[l];
  return static_cast<int>(total);
#endif
}

EXPANDER_INLINE VK larger(VK a, VK b) {
#if defined(EXPANDER_AVX512)
  __m512i r = _mm512_max_epi64((__m512i)(a), (__m512i)(b));
  return (VK)(r);
#else
  return a > b ? a : b;
#endif
}

EXPANDER_INLINE VK smaller(VK a, VK b) {
#if defined(EXPANDER_AVX512)
  __m512i r = _mm512_min_epi64((__m512i)(a), (__m512i)(b));
  return (VK)(r);
#else
  return a > b ? b : a;
#endif
}

// Lane l of the result is lane pick(l) of (a, b) laid end to end.
#define EXPANDER_LANES_2(F) F(0), F(1)
#define EXPANDER_LANES_4(F) EXPANDER_LANES_2(F), F(2), F(3)
#define EXPANDER_LANES_8(F) EXPANDER_LANES_4(F), F(4), F(5), F(6), F(7)
#define EXPANDER_LANES_16(F) EXPANDER_LANES_8(F), F(8), F(9), F(10), F(11), F(12), F(13), F(14), F(15)

template <int kXor>
EXPANDER_INLINE VK swap_lanes(VK v) {
#define EXPANDER_PICK(l) (((l) ^ kXor) % kKeyLanes)
#if defined(__clang__)
#if defined(EXPANDER_AVX512)
  return __builtin_shufflevector(v, v, EXPANDER_LANES_8(EXPANDER_PICK));
#elif defined(EXPANDER_AVX2)
  return __builtin_shufflevector(v, v, EXPANDER_LANES_4(EXPANDER_PICK));
#else
  return __builtin_shufflevector(v, v, EXPANDER_LANES_2(EXPANDER_PICK));
#endif
#else
#if defined(EXPANDER_AVX512)
  return __builtin_shuffle(v, VK{EXPANDER_LANES_8(EXPANDER_PICK)});
#elif defined(EXPANDER_AVX2)
  return __builtin_shuffle(v, VK{EXPANDER_LANES_4(EXPANDER_PICK)});
#else
  return __builtin_shuffle(v, VK{EXPANDER_LANES_2(EXPANDER_PICK)});
#endif
#endif
#undef EXPANDER_PICK
}

// One butterfly of a transpose: exchanges the off-diagonal blocks of width kStep of rows a (upper) and b (lower).
template <int kStep>
EXPANDER_INLINE void exchange(VF& a, VF& b) {
#define EXPANDER_UPPER(l) (((l) & kStep) ? kLanes + ((l) ^ kStep) : (l))
#define EXPANDER_LOWER(l) (((l) & kStep) ? kLanes + (l) : ((l) | kStep))
#if defined(EXPANDER_AVX512)
#define EXPANDER_LANES EXPANDER_LANES_16
#elif defined(EXPANDER_AVX2)
#define EXPANDER_LANES EXPANDER_LANES_8
#else
#define EXPANDER_LANES EXPANDER_LANES_4
#endif
#if defined(__clang__)
  const VF upper = __builtin_shufflevector(a, b, EXPANDER_LANES(EXPANDER_UPPER));
  const VF lower = __builtin_shufflevector(a, b, EXPANDER_LANES(EXPANDER_LOWER));
#else
  const VF upper = __builtin_shuffle(a, b, VI{EXPANDER_LANES(EXPANDER_UPPER)});
  const VF lower = __builtin_shuffle(a, b, VI{EXPANDER_LANES(EXPANDER_LOWER)});
#endif
#undef EXPANDER_UPPER
#undef EXPANDER_LOWER
  a = upper;
  b = lower;
}

template <int kStep>
EXPANDER_INLINE void transpose_step(VF (&r)[kLanes]) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & kStep) == 0) exchange<kStep>(r[i], r[i | kStep]);
    }
    transpose_step<kStep * 2>(r);
  }
}

EXPANDER_INLINE void transpose(VF (&r)[kLanes]) { transpose_step<1>(r); }

// ---------------------------------------------------------------------------------------------- 16-bit floats

EXPANDER_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

EXPANDER_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

EXPANDER_INLINE float half_to_float(uint16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x);
#else
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t rest = x & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return bits_to_float(sign | ((rest << 13) + 0x38000000u));
  const float tiny = static_cast<float>(rest) * 5.9604644775390625e-8f;  // subnormal: units of 2^-24
  return bits_to_float(sign | float_to_bits(tiny));
#endif
}

EXPANDER_INLINE uint16_t float_to_half(float x) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (rest < 0x38800000u) {
    // Subnormal: adding 0.5 lets the float adder round to a multiple of 2^-24.
    const float shifted = bits_to_float(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u);
  return static_cast<uint16_t>(sign | rounded >> 13);
#endif
}

struct F32 {
  using type = float;
  EXPANDER_INLINE static float load(type x) { return x; }
  EXPANDER_INLINE static type store(float x) { return x; }
  EXPANDER_INLINE static VF load_lanes(const type* p) { return ::load(p); }
};

struct BF16 {
  using type = uint16_t;
  EXPANDER_INLINE static float load(type x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }
  EXPANDER_INLINE static type store(float x) {
    const uint32_t bits = float_to_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<type>(bits >> 16 | 0x40u);
    return static_cast<type>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
  EXPANDER_INLINE static VF load_lanes(const type* p) {
    typedef uint16_t V16 __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
    typedef uint32_t V32 __attribute__((vector_size(kLanes * 4)));
    V32 wide = __builtin_convertvector(*reinterpret_cast<const V16*>(p), V32) << 16;
    return (VF)(wide);
  }
};

struct F16 {
  using type = uint16_t;
  EXPANDER_INLINE static float load(type x) { return half_to_float(x); }
  EXPANDER_INLINE static type store(float x) { return float_to_half(x); }
  EXPANDER_INLINE static VF load_lanes(const type* p) {
#if defined(EXPANDER_AVX512)
    __m512 v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return (VF)(v);
#elif defined(EXPANDER_AVX2) && defined(__F16C__)
    __m256 v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return (VF)(v);
#else
    VF v;
    for (int l = 0; l < kLanes; ++l) v[l] = half_to_float(p[l]);
    return v;
#endif
  }
};

}  // namespace
