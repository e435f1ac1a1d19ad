#include "core/parallel.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#define EXPANDER_POSIX 1
#endif

namespace expander {
namespace {

struct Region {
  const std::function<void(int64_t, int)>* job;
  int64_t jobs;
  int threads;
  std::atomic<int64_t> next{0};
  std::atomic<int> slot{0};
  std::mutex mutex;
  std::exception_ptr error;
};

void work(void* data) {
  auto& region = *static_cast<Region*>(data);
  const int slot = region.slot.fetch_add(1, std::memory_order_relaxed);
  if (slot >= region.threads) return;
  try {
    for (;;) {
      const int64_t i = region.next.fetch_add(1, std::memory_order_relaxed);
      if (i >= region.jobs) return;
      (*region.job)(i, slot);
    }
  } catch (...) {
    region.next.store(region.jobs, std::memory_order_relaxed);
    const std::lock_guard<std::mutex> lock(region.mutex);
    if (!region.error) region.error = std::current_exception();
  }
}

// torch keeps an OpenMP pool whose idle workers spin for a while after each of its own operators. A second pool would
// fight them for the cores, so we run on that very pool when its entry point is visible in the process. A forked child
// inherits the pool's memory but not its threads (libgomp then hangs): it gets fresh threads instead.
using OpenMPParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

OpenMPParallel openmp() {
#ifdef EXPANDER_POSIX
  static const auto found = reinterpret_cast<OpenMPParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  static const pid_t owner = getpid();
  if (found != nullptr && getpid() == owner) return found;
#endif
  return nullptr;
}

}  // namespace

const char* parallel_runtime() { return openmp() != nullptr ? "openmp" : "std::thread"; }

void parallel_for(int64_t jobs, int threads, const std::function<void(int64_t, int)>& job) {
  if (jobs <= 0) return;
  if (threads > jobs) threads = static_cast<int>(jobs);
  if (threads <= 1) {
    for (int64_t i = 0; i < jobs; ++i) job(i, 0);
    return;
  }
  Region region;
  region.job = &job;
  region.jobs = jobs;
  region.threads = threads;
  if (const auto parallel = openmp()) {
    parallel(&work, &region, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(threads - 1));
    try {
      for (int i = 1; i < threads; ++i) others.emplace_back(&work, &region);
    } catch (const std::system_error&) {
      // No more threads to be had: the ones there are finish the jobs.
    }
    work(&region);
    for (auto& thread : others) thread.join();
  }
  if (region.error) std::rethrow_exception(region.error);
}

}  // namespace expander
