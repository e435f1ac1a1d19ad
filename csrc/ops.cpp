#include "ops.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "double.h"
#include "parallel.h"

namespace expander {
namespace {

std::vector<const Kernels*> find_tables() {
  std::vector<const Kernels*> tables;
#if defined(EXPANDER_HAS_AVX512) || defined(EXPANDER_HAS_AVX2)
  __builtin_cpu_init();
#endif
#ifdef EXPANDER_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("fma")) {
    tables.push_back(kernels_avx512());
  }
#endif
#ifdef EXPANDER_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(kernels_avx2());
#endif
  tables.push_back(kernels_plain());
  return tables;
}

const std::vector<const Kernels*>& tables() {
  static const std::vector<const Kernels*> found = find_tables();
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  return table != nullptr ? *table : *tables().front();
}

// Scratch of every thread, allocated by the thread that uses it (first touch), on 64-byte boundaries.
class ScratchPool {
 public:
  ScratchPool(int threads, size_t bytes) : bytes_(bytes), parts_(static_cast<size_t>(threads)) {}

  void* of(int slot) {
    auto& part = parts_[static_cast<size_t>(slot)];
    if (part == nullptr) part.reset(::operator new(bytes_ + 64, std::align_val_t{64}));
    return part.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  size_t bytes_;
  std::vector<std::unique_ptr<void, Free>> parts_;
};

void check_rows(const int32_t* rows, int64_t n, int64_t d, int64_t m, int threads) {
  const Kernels& use = kernels();
  constexpr int64_t kPart = int64_t{1} << 18;
  const int64_t count = n * d, parts = (count + kPart - 1) / kPart;
  std::atomic<bool> good{true};
  parallel_for(parts, threads, [&](int64_t part, int) {
    const int64_t begin = part * kPart, size = std::min(kPart, count - begin);
    if (!use.rows_in_range(rows + begin, size, m)) good.store(false, std::memory_order_relaxed);
  });
  if (!good) throw std::out_of_range("rows holds an entry outside [0, d_in): the mask does not belong to this width");
}

int32_t largest_row(const int32_t* rows, int64_t count, int threads) {
  constexpr int64_t kPart = int64_t{1} << 18;
  const int64_t parts = (count + kPart - 1) / kPart;
  std::vector<int32_t> largest(static_cast<size_t>(parts));
  parallel_for(parts, threads, [&](int64_t part, int) {
    const int64_t begin = part * kPart, end = std::min(count, begin + kPart);
    int32_t most = 0;
    for (int64_t i = begin; i < end; ++i) most = std::max(most, rows[i]);
    largest[static_cast<size_t>(part)] = most;
  });
  return parts == 0 ? 0 : *std::max_element(largest.begin(), largest.end());
}

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

const char* const* available_isas() {
  static const std::vector<const char*> names = [] {
    std::vector<const char*> list;
    for (const Kernels* table : tables()) list.push_back(table->name);
    list.push_back(nullptr);
    return list;
  }();
  return names.data();
}

bool use_isa(const char* name) {
  for (const Kernels* table : tables()) {
    if (std::strcmp(table->name, name) == 0) {
      chosen.store(table);
      return true;
    }
  }
  return false;
}

const char* current_isa() { return kernels().name; }

void encode(const EncodeArgs& a, int threads) {
  if (a.B == 0 || a.k == 0) return;
  threads = std::max(threads, 1);
  check_rows(a.rows, a.n, a.d, a.m, threads);
  if (a.dtype == DType::f64) {
    ScratchPool scratch(threads, double_scratch_bytes(a.n, a.m));
    parallel_for(a.B, threads, [&](int64_t b, int slot) { encode_double(a, b, b + 1, scratch.of(slot)); });
    return;
  }

  const Kernels& use = kernels();
  const int tile = use.tile_width((a.B + threads - 1) / threads, a.m);
  const int64_t tiles = (a.B + tile - 1) / tile;
  // With fewer tiles than threads the features are split as well, when there are enough of them to pay for the merge.
  int64_t segments = 1;
  if (tiles < threads) {
    segments = std::min<int64_t>(threads / tiles, a.n / std::max<int64_t>(2048, 8 * a.k));
    segments = std::max<int64_t>(segments, 1);
  }
  const int64_t jobs = tiles * segments;
  const int workers = static_cast<int>(std::min<int64_t>(threads, jobs));
  ScratchPool scratch(workers, use.encode_scratch_bytes(a, tile));

  Partial partial{nullptr, 0, 0};
  std::unique_ptr<int64_t[]> keys;
  if (segments > 1) {
    partial.width = a.k;
    partial.stride = use.merge_room(segments * a.k, a.k);
    keys.reset(new int64_t[static_cast<size_t>(a.B * partial.stride)]);
    partial.keys = keys.get();
  }
  const auto first_of = [&](int64_t segment) { return a.n * segment / segments; };

  // Samples whose estimated threshold was too high, by segment.
  std::vector<int64_t> failed(static_cast<size_t>(jobs * tile));
  std::vector<int> failures(static_cast<size_t>(jobs));
  const auto job_for = [&](int64_t segment, void* memory) {
    EncodeJob job{};
    job.args = &a;
    job.begin = first_of(segment);
    job.end = first_of(segment + 1);
    job.partial = partial;
    if (partial.keys != nullptr) job.partial.keys += segment * partial.width;
    job.scratch = memory;
    return job;
  };
  parallel_for(jobs, workers, [&](int64_t i, int slot) {
    EncodeJob job = job_for(i / tiles, scratch.of(slot));
    job.first = i % tiles * tile;
    job.count = static_cast<int>(std::min<int64_t>(tile, a.B - job.first));
    job.failed = &failed[static_cast<size_t>(i * tile)];
    failures[static_cast<size_t>(i)] = use.encode_tile(job, tile);
  });

  // The unlucky samples, packed into tiles of their own.
  struct Retry {
    int64_t segment, first;
    int count;
  };
  std::vector<int64_t> samples;
  std::vector<Retry> retries;
  for (int64_t segment = 0; segment < segments; ++segment) {
    auto start = static_cast<int64_t>(samples.size());
    for (int64_t i = segment * tiles; i < (segment + 1) * tiles; ++i) {
      const auto from = failed.begin() + i * tile;
      samples.insert(samples.end(), from, from + failures[static_cast<size_t>(i)]);
    }
    for (const auto end = static_cast<int64_t>(samples.size()); start < end; start += tile) {
      retries.push_back({segment, start, static_cast<int>(std::min<int64_t>(tile, end - start))});
    }
  }
  parallel_for(static_cast<int64_t>(retries.size()), workers, [&](int64_t i, int slot) {
    const Retry& retry = retries[static_cast<size_t>(i)];
    const int narrow = std::min(tile, use.tile_width(retry.count, a.m));
    EncodeJob job = job_for(retry.segment, scratch.of(slot));
    job.samples = samples.data() + retry.first;
    job.count = retry.count;
    job.safe = true;
    use.encode_tile(job, narrow);
  });

  if (segments > 1) {
    parallel_for(a.B, workers, [&](int64_t b, int) {
      use.merge_partial(a, keys.get() + b * partial.stride, segments * a.k, b);
    });
  }
}

void correlate(const CorrelateArgs& a, int threads) {
  if (a.B == 0 || a.n == 0) return;
  threads = std::max(threads, 1);
  check_rows(a.rows, a.n, a.d, a.m, threads);
  if (a.dtype == DType::f64) {
    parallel_for(a.B, threads, [&](int64_t b, int) { correlate_double(a, b, b + 1); });
    return;
  }
  const Kernels& use = kernels();
  const int tile = use.tile_width((a.B + threads - 1) / threads, a.m);
  const int64_t tiles = (a.B + tile - 1) / tile;
  int64_t segments = 1;
  if (tiles < threads) segments = std::max<int64_t>(1, std::min<int64_t>(threads / tiles, a.n / 1024));
  ScratchPool scratch(threads, use.correlate_scratch_bytes(a, tile));
  parallel_for(tiles * segments, threads, [&](int64_t i, int slot) {
    const int64_t segment = i / tiles, first = i % tiles * tile;
    // Ranges start on whole vectors of features.
    const int64_t begin = a.n * segment / segments / 16 * 16;
    const int64_t end = segment + 1 == segments ? a.n : a.n * (segment + 1) / segments / 16 * 16;
    use.correlate_tile(a, first, static_cast<int>(std::min<int64_t>(tile, a.B - first)), begin, end, scratch.of(slot), tile);
  });
}

void decode(const SparseArgs& a, int threads) { by_sample(a, threads, false, kernels().decode); }

void correlate_at(const SparseArgs& a, int threads) { by_sample(a, threads, false, kernels().correlate_at); }

void gram(const SparseArgs& given, int threads) {
  SparseArgs a = given;
  if (a.m == 0) a.m = int64_t{1} + largest_row(a.rows, a.n * a.d, threads);
  by_sample(a, threads, true, kernels().gram);
}

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
