// A tile of samples: scaling on the way in, correlations of all features with all samples, the code on the way out.
#pragma once

#include <cmath>

#include "pursuit.h"
#include "pursuit_factor.h"
#include "simd.h"

namespace {

using expander::PursuitArgs;

struct Scale {
  int exponent;  // the sample was multiplied by 2^-exponent
  float norm;    // after that
  bool finite;
};

// out[i * step] = h[i] * 2^-exponent, the largest magnitude in [1/2, 1).
EXPANDER_INLINE Scale load_sample(const float* h, int64_t m, float* out, int64_t step) {
  Scale scale{0, 0.0f, true};
  float peak = 0.0f;
  for (int64_t i = 0; i < m; ++i) {
    const float magnitude = std::fabs(h[i]);
    peak = magnitude > peak ? magnitude : peak;
    scale.finite &= magnitude <= 3.4028235e38f;
  }
  if (!scale.finite) peak = 0.0f;
  std::frexp(peak, &scale.exponent);
  const double factor = scale.finite ? std::ldexp(1.0, -scale.exponent) : 0.0;
  double squares = 0.0;
  for (int64_t i = 0; i < m; ++i) {
    const auto x = scale.finite ? static_cast<float>(static_cast<double>(h[i]) * factor) : 0.0f;
    out[i * step] = x;
    squares += static_cast<double>(x) * static_cast<double>(x);
  }
  scale.norm = static_cast<float>(std::sqrt(squares));
  return scale;
}

EXPANDER_INLINE float norm_of(const float* r, int64_t m, int64_t step) {
  if (step == 1) {
    VF total[2] = {VF{}, VF{}};
    int64_t i = 0;
    for (; i + 2 * kLanes <= m; i += 2 * kLanes) {
      total[0] += load(r + i) * load(r + i);
      total[1] += load(r + i + kLanes) * load(r + i + kLanes);
    }
    float rest = 0.0f;
    for (; i < m; ++i) rest += r[i] * r[i];
    return std::sqrt(sum_lanes(total[0] + total[1]) + rest);
  }
  float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) {
    for (int u = 0; u < 4; ++u) total[u] += r[(i + u) * step] * r[(i + u) * step];
  }
  for (; i < m; ++i) total[0] += r[i * step] * r[i * step];
  return std::sqrt((total[0] + total[1]) + (total[2] + total[3]));
}

EXPANDER_INLINE float enough_for(const PursuitArgs& a, const Scale& scale) {
  return a.tol < 0.0f ? kFloor * scale.norm : a.tol * scale.norm;
}

EXPANDER_INLINE float correlation(const PursuitArgs& a, int32_t feature, const float* r, int64_t step) {
  const int32_t* rows = a.rows + feature * a.d;
  const float* values = a.values + feature * a.d;
  float total = 0.0f;
  for (int64_t t = 0; t < a.d; ++t) total += values[t] * r[rows[t] * step];
  return total;
}

// scores[lane * stride + j] = <w_j, r_lane> for the kLanes samples of a group; r[i * width + lane].
// offsets = rows * width.
EXPANDER_INLINE void correlate_group(
    const float* r, const int32_t* offsets, const float* values, int64_t n, int64_t d, int64_t stride, float* scores) {
  for (int64_t j = 0; j < n; j += kLanes) {
    VF block[kLanes];
    const int64_t columns = n - j < kLanes ? n - j : kLanes;
    if (columns == kLanes) {
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) {
        const int32_t* at = offsets + (j + c) * d;
        const float* value = values + (j + c) * d;
        VF total = VF{};
        for (int64_t t = 0; t < d; ++t) total += splat(value[t]) * load(r + at[t]);
        block[c] = total;
      }
    } else {
      for (int c = 0; c < kLanes; ++c) {
        block[c] = VF{};
        if (c >= columns) continue;
        for (int64_t t = 0; t < d; ++t) block[c] += splat(values[(j + c) * d + t]) * load(r + offsets[(j + c) * d + t]);
      }
    }
    transpose(block);
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) store(scores + lane * stride + j, block[lane]);
  }
}

EXPANDER_INLINE void write_code(
    const PursuitArgs& a, int64_t sample, const Scale& scale, const int32_t* features, const float* x, int64_t used,
    float residual, int64_t rounds) {
  int32_t* indices = a.indices + sample * a.k;
  float* code = a.code + sample * a.k;
  for (int64_t s = 0; s < used; ++s) {
    indices[s] = features[s];
    code[s] = static_cast<float>(std::ldexp(static_cast<double>(x[s]), scale.exponent) / static_cast<double>(a.norms[features[s]]));
  }
  a.residual_norms[sample] = static_cast<float>(std::ldexp(static_cast<double>(residual), scale.exponent));
  a.iterations[sample] = static_cast<int32_t>(rounds);
  a.used[sample] = scale.finite ? static_cast<int32_t>(used) : -1;
}

}  // namespace
