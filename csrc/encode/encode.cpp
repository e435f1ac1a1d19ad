// Encode and correlate: the work shared among threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "core/dispatch.h"
#include "core/operations.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "encode/double.h"

namespace expander {

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

}  // namespace expander
