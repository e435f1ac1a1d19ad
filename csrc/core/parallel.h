#pragma once

#include <cstdint>
#include <functional>

namespace expander {

// Runs job(i, slot) for every i in [0, jobs) on at most `threads` threads; slot < threads names the thread for scratch.
// Jobs are handed out dynamically, so they must not depend on each other or on the order. The first exception is rethrown.
void parallel_for(int64_t jobs, int threads, const std::function<void(int64_t, int)>& job);

// The runtime that serves parallel_for: "openmp" (the one already loaded in this process) or "std::thread".
const char* parallel_runtime();

}  // namespace expander
