#include "encode/double.h"

#include <algorithm>
#include <cmath>

namespace expander {
namespace {

struct Candidate {
  double rank;  // |z| or z
  double z;
  int64_t index;
};

struct Before {
  bool operator()(const Candidate& a, const Candidate& b) const {
    const bool a_nan = std::isnan(a.rank), b_nan = std::isnan(b.rank);
    if (a_nan != b_nan) return a_nan;
    if (!a_nan && a.rank != b.rank) return a.rank > b.rank;
    return a.index < b.index;
  }
};

double score(const double* h, const int32_t* rows, const double* values, int64_t d) {
  double sum = 0;
  for (int64_t t = 0; t < d; ++t) sum += values[t] * h[rows[t]];
  return sum;
}

}  // namespace

size_t double_scratch_bytes(int64_t n, int64_t m) {
  return static_cast<size_t>(n) * sizeof(Candidate) + static_cast<size_t>(m) * sizeof(double);
}

void encode_double(const EncodeArgs& a, int64_t begin, int64_t end, void* scratch) {
  auto* const list = static_cast<Candidate*>(scratch);
  const auto* values = static_cast<const double*>(a.values);
  const auto* bias = static_cast<const double*>(a.b_enc);
  const auto* center = static_cast<const double*>(a.center);
  auto* const h = reinterpret_cast<double*>(list + a.n);
  for (int64_t b = begin; b < end; ++b) {
    const double* from = static_cast<const double*>(a.h) + b * a.m;
    double zero = 0;  // NaN if an entry is NaN or infinite
    for (int64_t i = 0; i < a.m; ++i) {
      zero += from[i] * 0.0;
      h[i] = center != nullptr ? from[i] - center[i] : from[i];
    }
    if (a.infinite != nullptr && zero != 0.0) a.infinite->store(true, std::memory_order_relaxed);
    int64_t listed = 0;
    for (int64_t j = 0; j < a.n; ++j) {
      const double z = score(h, a.rows + j * a.d, values + j * a.d, a.d) + (bias != nullptr ? bias[j] : 0.0);
      const double rank = a.magnitude ? std::fabs(z) : z;
      list[listed] = {rank, z, j};
      listed += !a.empties(rank);
    }
    const int64_t kept = std::min(a.k, listed);
    std::partial_sort(list, list + kept, list + listed, Before{});
    for (int64_t s = 0; s < a.k; ++s) {
      const bool empty = s >= kept;
      a.out_indices[b * a.k + s] = empty ? 0 : static_cast<int32_t>(list[s].index);
      static_cast<double*>(a.out_values)[b * a.k + s] = empty ? 0.0 : list[s].z;
    }
  }
}

void correlate_double(const CorrelateArgs& a, int64_t begin, int64_t end) {
  const auto* values = static_cast<const double*>(a.values);
  for (int64_t b = begin; b < end; ++b) {
    const double* h = static_cast<const double*>(a.h) + b * a.m;
    double* const out = static_cast<double*>(a.out) + b * a.n;
    for (int64_t j = 0; j < a.n; ++j) out[j] = score(h, a.rows + j * a.d, values + j * a.d, a.d);
  }
}

}  // namespace expander
