// A sample's best keys written out as its code.
#pragma once

#include <cmath>

#include "core/args.h"
#include "core/simd.h"
#include "encode/select.h"

namespace {

// The lowest float above `threshold`, or infinity.
inline float lowest_above(double threshold) {
  const auto near = static_cast<float>(threshold);
  return static_cast<double>(near) > threshold ? near : std::nextafter(near, INFINITY);
}

// `kept` of the k slots have a key, the others are empty.
template <bool kMagnitude>
void write_code(const expander::EncodeArgs& a, const int64_t* keys, int64_t kept, int64_t sample) {
  int32_t* const index = a.out_indices + sample * a.k;
  const auto value = [&](int64_t i) {
    const float size = i < kept ? unordered(key_score(keys[i])) : 0.0f;
    const bool empty = i >= kept || a.empties(size);  // NaN is no less than any threshold: it shows
    index[i] = empty ? 0 : key_index(keys[i]);
    return empty ? 0.0f : kMagnitude && (keys[i] & 1) != 0 ? -size : size;
  };
  if (a.out_dtype == expander::DType::f32) {
    float* out = static_cast<float*>(a.out_values) + sample * a.k;
    for (int64_t i = 0; i < a.k; ++i) out[i] = value(i);
  } else {
    uint16_t* out = static_cast<uint16_t*>(a.out_values) + sample * a.k;
    const bool bf16 = a.out_dtype == expander::DType::bf16;
    for (int64_t i = 0; i < a.k; ++i) out[i] = bf16 ? BF16::store(value(i)) : F16::store(value(i));
  }
}

}  // namespace
