#include "core/dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "core/parallel.h"

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

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  return table != nullptr ? *table : *tables().front();
}

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

}  // namespace expander
