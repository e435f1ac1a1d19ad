// The kernel table of an instruction set, and the choice among the tables this build and this processor both have.
#pragma once

#include "core/args.h"
#include "encode/job.h"
#include "pursuit/args.h"

namespace expander {

struct Kernels {
  const char* name;
  int (*tile_width)(int64_t samples_per_thread, int64_t m);
  size_t (*encode_scratch_bytes)(const EncodeArgs&, int tile);
  int (*encode_tile)(const EncodeJob&, int tile);  // returns how many samples failed
  int64_t (*merge_room)(int64_t count, int64_t k);
  void (*merge_partial)(const EncodeArgs&, int64_t* keys, int64_t count, int64_t sample);
  size_t (*correlate_scratch_bytes)(const CorrelateArgs&, int tile);
  void (*correlate_tile)(const CorrelateArgs&, int64_t first, int count, int64_t begin, int64_t end, void* scratch, int tile);
  // Each returns false when it met an index or row out of range (nothing out of range is touched).
  bool (*decode)(const SparseArgs&, int64_t begin, int64_t end, void* scratch);
  bool (*correlate_at)(const SparseArgs&, int64_t begin, int64_t end, void* scratch);
  bool (*values_grad)(const SparseArgs&, int64_t first_feature, int64_t last_feature, void* scratch);
  bool (*gram)(const SparseArgs&, int64_t begin, int64_t end, void* scratch);
  bool (*step_samples)(const StepArgs&, int64_t begin, int64_t end, void* scratch);  // begin: a multiple of kStepChunk
  void (*step_features)(const StepArgs&, int64_t begin, int64_t end, int64_t first, int64_t last, void* scratch);
  size_t (*step_scratch_bytes)(const StepArgs&);
  size_t (*sparse_scratch_bytes)(const SparseArgs&, bool gram);
  bool (*rows_in_range)(const int32_t* rows, int64_t count, int64_t m);
  int lanes;  // samples side by side in a group of a pursuit
  size_t (*matching_scratch_bytes)(const PursuitArgs&);
  void (*matching_tile)(const PursuitArgs&, const ByRow&, const int32_t* offsets, int64_t first, int count, void* scratch);
  size_t (*omp_scratch_bytes)(const PursuitArgs&, int groups);
  void (*omp_tile)(const PursuitArgs&, const int32_t* offsets, int64_t first, int count, int groups, void* scratch);
};

const Kernels* kernels_plain();
#ifdef EXPANDER_HAS_AVX2
const Kernels* kernels_avx2();
#endif
#ifdef EXPANDER_HAS_AVX512
const Kernels* kernels_avx512();
#endif

// The table in use.
const Kernels& kernels();
// Names of the instruction sets this build and this processor both have, best first.
const char* const* available_isas();
// Uses the named instruction set from now on; false when it is not available.
bool use_isa(const char* name);

// Throws std::out_of_range when a row is outside [0, m).
void check_rows(const int32_t* rows, int64_t n, int64_t d, int64_t m, int threads);

}  // namespace expander
