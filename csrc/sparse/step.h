// One training step of the plain case: L = mean over samples of |r|^2, r = h - b_dec - W x, x = TopK(Wᵀ(h - b_dec) + b_enc),
// and its gradient by W's values and both biases. With c = h - b_dec and y = dL/dz on the selected features,
//   dL/dx = -2/B Wᵀr,   y = dL/dx (where a slot is filled),
//   dL/dW[:, j]  = sum_b (-2/B) x_j r + y_j c      (restricted to the support),
//   dL/db_enc    = sum_b y,   dL/db_dec = -2/B sum_b r - W dL/db_enc.
#pragma once

#include "core/args.h"
#include "core/simd.h"
#include "sparse/sparse.h"

namespace {

using expander::StepArgs;

// to = h[b] - b_dec
template <class Float, class S>
EXPANDER_INLINE void centred_row(const StepArgs& a, int64_t b, S* to) {
  const auto* h = static_cast<const typename Float::type*>(a.h) + b * a.m;
  const S* center = static_cast<const S*>(a.b_dec);
  int64_t i = 0;
  if constexpr (sizeof(S) == 4) {
    for (; i + kLanes <= a.m; i += kLanes) store(to + i, Float::load_lanes(h + i) - load(center + i));
  }
  for (; i < a.m; ++i) to[i] = Float::load(h[i]) - center[i];
}

template <class Float>
bool step_samples_as(const StepArgs& a, int64_t begin, int64_t end, void*) {
  using S = typename Sum<Float>::type;
  const S scale = S(-2) / static_cast<S>(a.B);
  bool good = true;
  for (int64_t b = begin; b < end; ++b) {
    S* const r = static_cast<S*>(a.residual) + b * a.m;
    centred_row<Float>(a, b, r);
    const int32_t* index = a.indices + b * a.k;
    const S* code = static_cast<const S*>(a.code) + b * a.k;
    S* const grad = static_cast<S*>(a.code_grad) + b * a.k;
    const bool known = for_features<S>(a, index, [&](int64_t s, const int32_t* rows, const S* values) {
      for (int64_t t = 0; t < a.d; ++t) r[rows[t]] -= code[s] * values[t];
    });
    good &= known;
    S* const sum = static_cast<S*>(a.partial) + b / expander::kStepChunk * a.m;
    if (b % expander::kStepChunk == 0) std::memset(sum, 0, static_cast<size_t>(a.m) * sizeof(S));
    constexpr int kParts = 16;
    S part[kParts] = {};
    int64_t i = 0;
    for (; i + kParts <= a.m; i += kParts) {
      for (int l = 0; l < kParts; ++l) {
        part[l] += r[i + l] * r[i + l];
        sum[i + l] += r[i + l];
      }
    }
    S error = 0;
    for (; i < a.m; ++i) {
      error += r[i] * r[i];
      sum[i] += r[i];
    }
    for (int l = 0; l < kParts; ++l) error += part[l];
    static_cast<S*>(a.errors)[b] = error;
    if (!known) continue;
    for (int64_t s = 0; s < a.k; ++s) {
      const int64_t at = static_cast<int64_t>(index[s]) * a.d;
      const int32_t* rows = a.rows + at;
      const S* values = static_cast<const S*>(a.values) + at;
      S dot = 0;
      for (int64_t t = 0; t < a.d; ++t) dot += values[t] * r[rows[t]];
      grad[s] = a.thresholded && code[s] == 0 ? S(0) : scale * dot;
    }
  }
  return good;
}

// Adds what samples [begin, end) give to the gradients by the values and b_enc of features [first, last), which the first
// samples set to zero; see values_grad_as for why a range of features.
template <class Float>
void step_features_as(const StepArgs& a, int64_t begin, int64_t end, int64_t first, int64_t last, void* scratch) {
  using S = typename Sum<Float>::type;
  const S scale = S(-2) / static_cast<S>(a.B);
  S* const grad_values = static_cast<S*>(a.grad_values);
  S* const grad_b_enc = static_cast<S*>(a.grad_b_enc);
  S* const c = static_cast<S*>(scratch);
  auto* const mine = reinterpret_cast<int32_t*>(c + a.m);
  if (begin == 0) {
    std::memset(grad_values + first * a.d, 0, static_cast<size_t>((last - first) * a.d) * sizeof(S));
    std::memset(grad_b_enc + first, 0, static_cast<size_t>(last - first) * sizeof(S));
  }
  for (int64_t b = begin; b < end; ++b) {
    const int32_t* index = a.indices + b * a.k;
    const S* code = static_cast<const S*>(a.code) + b * a.k;
    const S* code_grad = static_cast<const S*>(a.code_grad) + b * a.k;
    const S* r = static_cast<const S*>(a.residual) + b * a.m;
    const int64_t count = features_between(first, last, index, a.k, mine);
    if (b + 1 < end) fetch(r + a.m, a.m * static_cast<int64_t>(sizeof(S)));
    if (count == 0) continue;
    centred_row<Float>(a, b, c);
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) fetch_gradient(a, grad_values, index[mine[i + kAhead]]);
      const int64_t feature = index[mine[i]];
      const int32_t* rows = a.rows + feature * a.d;
      S* const grad = grad_values + feature * a.d;
      const S x = scale * code[mine[i]], y = code_grad[mine[i]];
      if (x == 0 && y == 0) continue;  // an empty slot
      for (int64_t t = 0; t < a.d; ++t) grad[t] += x * r[rows[t]] + y * c[rows[t]];
      grad_b_enc[feature] += y;
    }
  }
}

size_t step_scratch_bytes(const StepArgs& a) { return static_cast<size_t>(a.m * 8 + a.k * 4) + 64; }

bool step_samples(const StepArgs& a, int64_t begin, int64_t end, void* scratch) {
  EXPANDER_AS_TYPE(step_samples, begin, end, scratch)
}
void step_features(const StepArgs& a, int64_t begin, int64_t end, int64_t first, int64_t last, void* scratch) {
  EXPANDER_AS_TYPE(step_features, begin, end, first, last, scratch)
}

}  // namespace
