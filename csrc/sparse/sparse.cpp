// The operations on named features, and the training step: the work shared among threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <vector>

#include "core/dispatch.h"
#include "core/operations.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace expander {
namespace {

// Borders of `parts` ranges of features with about equally many active ones. A feature's sums do not depend on them.
std::vector<int64_t> feature_edges(const int32_t* indices, int64_t count, int64_t n, int parts) {
  constexpr int64_t kBins = 1024;
  std::vector<int64_t> edges{0};
  if (parts > 1 && n > kBins) {
    std::vector<int64_t> bins(kBins);
    const double scale = static_cast<double>(kBins) / static_cast<double>(n);
    for (int64_t i = 0; i < count; ++i) {
      const auto bin = static_cast<int64_t>(static_cast<double>(indices[i]) * scale);
      ++bins[static_cast<size_t>(std::clamp<int64_t>(bin, 0, kBins - 1))];
    }
    int64_t seen = 0;
    for (int64_t bin = 0; bin < kBins && static_cast<int>(edges.size()) < parts; ++bin) {
      seen += bins[static_cast<size_t>(bin)];
      const int64_t edge = (bin + 1) * n / kBins;
      if (seen * parts >= count * static_cast<int64_t>(edges.size()) && edge > edges.back() && edge < n) edges.push_back(edge);
    }
  } else {
    for (int64_t part = 1; part < parts; ++part) {
      if (const int64_t edge = n * part / parts; edge > edges.back()) edges.push_back(edge);
    }
  }
  edges.push_back(n);
  return edges;
}

template <class Kernel>
void by_sample(const SparseArgs& a, int threads, bool gram, Kernel kernel) {
  // Enough jobs to even out the threads, few enough that handing them out costs nothing.
  const int64_t part = std::max<int64_t>(1, std::min<int64_t>(64, a.B / (int64_t{8} * std::max(threads, 1))));
  const int64_t jobs = (a.B + part - 1) / part;
  if (a.B * a.k * a.d < 4096) threads = 1;
  ScratchPool scratch(std::max(threads, 1), kernels().sparse_scratch_bytes(a, gram));
  std::atomic<bool> good{true};
  parallel_for(jobs, threads, [&](int64_t job, int slot) {
    if (!kernel(a, job * part, std::min(a.B, (job + 1) * part), scratch.of(slot))) good.store(false);
  });
  if (!good) throw std::out_of_range("an index is outside [0, d_sae) or a row outside [0, d_in)");
}

}  // namespace

void decode(const SparseArgs& a, int threads) { by_sample(a, threads, false, kernels().decode); }

void correlate_at(const SparseArgs& a, int threads) { by_sample(a, threads, false, kernels().correlate_at); }

void gram(const SparseArgs& a, int threads) { by_sample(a, threads, true, kernels().gram); }

void values_grad(const SparseArgs& a, int threads) {
  threads = std::max(threads, 1);
  if (a.B * a.k * a.d < 4096) threads = 1;
  const std::vector<int64_t> edges = feature_edges(a.indices, a.B * a.k, a.n, threads);
  const Kernels& use = kernels();
  ScratchPool scratch(threads, use.sparse_scratch_bytes(a, false));
  std::atomic<bool> good{true};
  parallel_for(static_cast<int64_t>(edges.size()) - 1, threads, [&](int64_t part, int slot) {
    const auto i = static_cast<size_t>(part);
    if (!use.values_grad(a, edges[i], edges[i + 1], scratch.of(slot))) good.store(false);
  });
  if (!good) throw std::out_of_range("an index is outside [0, d_sae) or a row outside [0, d_in)");
}

namespace {

// grad_b_dec = -2/B sum of residuals - W grad_b_enc. Both sums are taken over fixed parts, in their order.
template <class S>
void decoder_bias_grad(const StepArgs& a, S* out, int threads) {
  const int64_t chunks = (a.B + kStepChunk - 1) / kStepChunk;
  constexpr int64_t kParts = 8;
  std::vector<S> sums(static_cast<size_t>(kParts * a.m));
  const S* grad_b_enc = static_cast<const S*>(a.grad_b_enc);
  parallel_for(kParts, a.n * a.d < 4096 ? 1 : threads, [&](int64_t part, int) {
    S* const sum = sums.data() + part * a.m;
    for (int64_t j = a.n * part / kParts; j < a.n * (part + 1) / kParts; ++j) {
      const S y = grad_b_enc[j];
      if (y == S(0)) continue;
      const int32_t* rows = a.rows + j * a.d;
      const S* values = static_cast<const S*>(a.values) + j * a.d;
      for (int64_t t = 0; t < a.d; ++t) sum[rows[t]] += y * values[t];
    }
  });
  const S scale = S(-2) / static_cast<S>(a.B);
  std::fill(out, out + a.m, S(0));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const S* partial = static_cast<const S*>(a.partial) + chunk * a.m;
    for (int64_t i = 0; i < a.m; ++i) out[i] += partial[i];
  }
  for (int64_t i = 0; i < a.m; ++i) out[i] *= scale;
  for (int64_t part = 0; part < kParts; ++part) {
    const S* sum = sums.data() + part * a.m;
    for (int64_t i = 0; i < a.m; ++i) out[i] -= sum[i];
  }
}

}  // namespace

void train_step(const EncodeArgs& args, StepArgs a, void* grad_b_dec, int threads) {
  threads = std::max(threads, 1);
  encode(args, threads);  // checks the rows
  const size_t wide = a.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  const int64_t chunks = (a.B + kStepChunk - 1) / kStepChunk;
  const std::unique_ptr<char[]> code_grad(new char[static_cast<size_t>(a.B * a.k) * wide]);
  const std::unique_ptr<char[]> partial(new char[static_cast<size_t>(chunks * a.m) * wide]);
  a.code_grad = code_grad.get();
  a.partial = partial.get();
  const Kernels& use = kernels();
  ScratchPool scratch(threads, use.step_scratch_bytes(a));
  std::atomic<bool> good{true};
  const std::vector<int64_t> edges = feature_edges(a.indices, a.B * a.k, a.n, threads);
  for (int64_t start = 0; start < a.B; start += kStepWindow) {
    const int64_t stop = std::min(a.B, start + kStepWindow);
    parallel_for((stop - start + kStepChunk - 1) / kStepChunk, threads, [&](int64_t chunk, int slot) {
      const int64_t begin = start + chunk * kStepChunk, end = std::min(stop, begin + kStepChunk);
      if (!use.step_samples(a, begin, end, scratch.of(slot))) good.store(false);
    });
    if (!good) throw std::out_of_range("an index is outside [0, d_sae) or a row outside [0, d_in)");
    parallel_for(static_cast<int64_t>(edges.size()) - 1, threads, [&](int64_t part, int slot) {
      const auto i = static_cast<size_t>(part);
      use.step_features(a, start, stop, edges[i], edges[i + 1], scratch.of(slot));
    });
  }
  if (a.dtype == DType::f64) {
    decoder_bias_grad(a, static_cast<double*>(grad_b_dec), threads);
  } else {
    decoder_bias_grad(a, static_cast<float*>(grad_b_dec), threads);
  }
}

}  // namespace expander
