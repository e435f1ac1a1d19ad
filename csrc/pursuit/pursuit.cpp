// Pursuits: the work shared among threads.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "core/dispatch.h"
#include "core/operations.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace expander {
namespace {

constexpr int64_t kCacheBytes = 1 << 20;  // a dictionary beyond it is better streamed for two groups of samples at once

std::vector<int32_t> tile_offsets(const PursuitArgs& a, int64_t width) {
  std::vector<int32_t> offsets(static_cast<size_t>(a.n * a.d));
  bool good = true;
  for (int64_t i = 0; i < a.n * a.d; ++i) {
    good &= a.rows[i] >= 0 && a.rows[i] < a.m;
    offsets[static_cast<size_t>(i)] = static_cast<int32_t>(a.rows[i] * width);
  }
  if (!good) throw std::out_of_range("rows holds an entry outside [0, d_in): the mask does not belong to this width");
  return offsets;
}

class RowLists {
 public:
  explicit RowLists(const PursuitArgs& a) : start_(static_cast<size_t>(a.m + 1), 0) {
    std::vector<int64_t> at(static_cast<size_t>(a.m), 0);
    for (int64_t i = 0; i < a.n * a.d; ++i) ++at[static_cast<size_t>(a.rows[i])];
    for (size_t i = 0; i < at.size(); ++i) {
      start_[i + 1] = start_[i] + (at[i] + kRowPadding - 1) / kRowPadding * kRowPadding;
      at[i] = start_[i];
    }
    column_.assign(static_cast<size_t>(start_.back()), static_cast<int32_t>(a.n));
    value_.assign(static_cast<size_t>(start_.back()), 0.0f);
    for (int64_t j = 0; j < a.n; ++j) {
      for (int64_t t = 0; t < a.d; ++t) {
        const auto place = static_cast<size_t>(at[static_cast<size_t>(a.rows[j * a.d + t])]++);
        column_[place] = static_cast<int32_t>(j);
        value_[place] = a.values[j * a.d + t];
      }
    }
  }

  ByRow view() const { return {start_.data(), column_.data(), value_.data()}; }

 private:
  std::vector<int64_t> start_;
  std::vector<int32_t> column_;
  std::vector<float> value_;
};

}  // namespace

void matching_pursuit(const PursuitArgs& a, int threads) {
  if (a.B == 0) return;
  const Kernels& use = kernels();
  const std::vector<int32_t> offsets = tile_offsets(a, use.lanes);
  const RowLists lists(a);
  const int64_t tiles = (a.B + use.lanes - 1) / use.lanes;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tiles)));
  ScratchPool scratch(threads, use.matching_scratch_bytes(a));
  parallel_for(tiles, threads, [&](int64_t tile, int slot) {
    const int64_t first = tile * use.lanes;
    const int count = static_cast<int>(std::min<int64_t>(use.lanes, a.B - first));
    use.matching_tile(a, lists.view(), offsets.data(), first, count, scratch.of(slot));
  });
}

void orthogonal_matching_pursuit(const PursuitArgs& a, int threads) {
  if (a.B == 0) return;
  const Kernels& use = kernels();
  threads = std::max(threads, 1);
  const bool streamed = a.n * a.d * static_cast<int64_t>(sizeof(float) + sizeof(int32_t)) > kCacheBytes;
  const int groups = streamed && a.B >= 2 * int64_t{use.lanes} * threads ? 2 : 1;
  const int64_t width = int64_t{groups} * use.lanes, tiles = (a.B + width - 1) / width;
  threads = static_cast<int>(std::min<int64_t>(threads, tiles));
  const std::vector<int32_t> offsets = tile_offsets(a, width);
  ScratchPool scratch(threads, use.omp_scratch_bytes(a, groups));
  parallel_for(tiles, threads, [&](int64_t tile, int slot) {
    const int64_t first = tile * width;
    const int count = static_cast<int>(std::min<int64_t>(width, a.B - first));
    use.omp_tile(a, offsets.data(), first, count, groups, scratch.of(slot));
  });
}

}  // namespace expander
