#include "pursuit.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "ops.h"
#include "parallel.h"

namespace expander {
namespace {

constexpr int64_t kTileBytes = 128 << 10;  // of residuals: more samples at once, as long as they stay in the L2 cache

const PursuitKernels& pursuit_kernels() {
  const char* isa = current_isa();
#ifdef EXPANDER_HAS_AVX512
  if (std::strcmp(isa, "avx512") == 0) return *pursuit_kernels_avx512();
#endif
#ifdef EXPANDER_HAS_AVX2
  if (std::strcmp(isa, "avx2") == 0) return *pursuit_kernels_avx2();
#endif
  (void)isa;
  return *pursuit_kernels_plain();
}

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

// Scratch of every thread, allocated by the thread that uses it.
class Scratch {
 public:
  Scratch(int threads, size_t bytes) : bytes_(bytes), parts_(static_cast<size_t>(threads)) {}

  void* of(int slot) {
    auto& part = parts_[static_cast<size_t>(slot)];
    if (part == nullptr) part.reset(::operator new(bytes_, std::align_val_t{64}));
    return part.get();
  }

 private:
  size_t bytes_;
  std::vector<std::unique_ptr<void, Free>> parts_;
};

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

}  // namespace

void matching_pursuit(const PursuitArgs& a, int threads) {
  if (a.B == 0) return;
  const PursuitKernels& use = pursuit_kernels();
  const std::vector<int32_t> offsets = tile_offsets(a, use.lanes);
  std::vector<int64_t> start(static_cast<size_t>(a.m + 1), 0);
  for (int64_t i = 0; i < a.n * a.d; ++i) ++start[static_cast<size_t>(a.rows[i] + 1)];
  for (int64_t i = 0; i < a.m; ++i) start[static_cast<size_t>(i + 1)] += start[static_cast<size_t>(i)];
  std::vector<int64_t> at(start.begin(), start.end() - 1);
  std::vector<int32_t> column(static_cast<size_t>(a.n * a.d));
  std::vector<float> value(static_cast<size_t>(a.n * a.d));
  for (int64_t j = 0; j < a.n; ++j) {
    for (int64_t t = 0; t < a.d; ++t) {
      const auto place = static_cast<size_t>(at[static_cast<size_t>(a.rows[j * a.d + t])]++);
      column[place] = static_cast<int32_t>(j);
      value[place] = a.values[j * a.d + t];
    }
  }
  const ByRow by_row{start.data(), column.data(), value.data()};
  const int64_t tiles = (a.B + use.lanes - 1) / use.lanes;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tiles)));
  Scratch scratch(threads, use.matching_scratch_bytes(a));
  parallel_for(tiles, threads, [&](int64_t tile, int slot) {
    const int64_t first = tile * use.lanes;
    const int count = static_cast<int>(std::min<int64_t>(use.lanes, a.B - first));
    use.matching_tile(a, by_row, offsets.data(), first, count, scratch.of(slot));
  });
}

void orthogonal_matching_pursuit(const PursuitArgs& a, int threads) {
  if (a.B == 0) return;
  const PursuitKernels& use = pursuit_kernels();
  threads = std::max(threads, 1);
  int groups = 1;
  while (groups < 4 && 2 * groups * use.lanes * a.m * static_cast<int64_t>(sizeof(float)) <= kTileBytes &&
         a.B >= 2 * int64_t{groups} * use.lanes * threads) {
    groups *= 2;
  }
  const int64_t width = int64_t{groups} * use.lanes, tiles = (a.B + width - 1) / width;
  threads = static_cast<int>(std::min<int64_t>(threads, tiles));
  const std::vector<int32_t> offsets = tile_offsets(a, width);
  Scratch scratch(threads, use.omp_scratch_bytes(a, groups));
  parallel_for(tiles, threads, [&](int64_t tile, int slot) {
    const int64_t first = tile * width;
    const int count = static_cast<int>(std::min<int64_t>(width, a.B - first));
    use.omp_tile(a, offsets.data(), first, count, groups, scratch.of(slot));
  });
}

}  // namespace expander
