// What the Python module, the drivers and the per-instruction-set kernels share: argument records and the kernel table.
//
// Notation is the Python side's: h (B, m), rows int32 (n, d), values (n, d), indices int32 (B, k). Every array is
// contiguous. All products of sizes are taken in 64 bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace expander {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

struct EncodeArgs {
  const void* h;         // (B, m), dtype
  const int32_t* rows;   // (n, d)
  const void* values;    // (n, d), float, or double when dtype is f64
  const void* b_enc;     // (n,) like values, or null
  const void* center;    // (m,) like values, subtracted from h, or null
  int32_t* out_indices;  // (B, k)
  void* out_values;      // (B, k), out_dtype
  int64_t B, m, n, d, k;
  DType dtype, out_dtype;
  bool relu, magnitude;
};

struct CorrelateArgs {
  const void* h;
  const int32_t* rows;
  const void* values;
  void* out;  // (B, n), dtype
  int64_t B, m, n, d;
  DType dtype;
};

// The operations that touch named features only.
struct SparseArgs {
  const void* h;  // (B, m), dtype
  const int32_t* indices;
  const void* code;  // (B, k), dtype of h or of the output
  const int32_t* rows;
  const void* values;  // (n, d) float (double for f64)
  void* out;
  int64_t B, m, n, d, k;
  DType dtype;
};

// Squared error of a tied TopK autoencoder and its gradient. "wide" is float, or double when dtype is f64.
struct StepArgs {
  const void* h;         // (B, m), dtype
  const int32_t* rows;   // (n, d)
  const void* values;    // (n, d) wide, as are all that follow
  const void* b_dec;     // (m,)
  const int32_t* indices;  // (B, k), the code
  const void* code;        // (B, k)
  void* residual;          // (B, m): h - b_dec - W x
  void* errors;            // (B,): its squared norms
  void* code_grad;         // (B, k): gradient of the mean of errors by the selected scores
  void* partial;           // (ceil(B / kStepChunk), m): sums of residuals
  void* grad_values;       // (n, d)
  void* grad_b_enc;        // (n,)
  int64_t B, m, n, d, k;
  DType dtype;
  bool relu;
};

// Samples summed in one go: sums over the batch are taken chunk by chunk whatever the number of threads.
constexpr int64_t kStepChunk = 16;
// Samples whose residuals are made and then read again for the gradients while they are in the cache.
constexpr int64_t kStepWindow = 8 * kStepChunk;

// Where a selection job puts its result when the features are split among threads.
struct Partial {
  int64_t* keys;   // sample b writes its best keys (see select.h) to keys[b * stride, b * stride + width)
  int64_t stride;
  int64_t width;
};

// One tile of samples against a range of features.
struct EncodeJob {
  const EncodeArgs* args;
  const int64_t* samples;  // sample numbers, or null for first, first + 1, ...
  int64_t first;
  int count;        // samples in this tile, at most 16 * vectors
  int64_t begin;    // features [begin, end)
  int64_t end;
  bool safe;        // no estimated threshold: always succeeds
  Partial partial;  // keys == nullptr: write the finished code
  void* scratch;
  int64_t* failed;  // room for `count`; receives the samples whose estimated threshold was too high
};

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
};

const Kernels* kernels_plain();
#ifdef EXPANDER_HAS_AVX2
const Kernels* kernels_avx2();
#endif
#ifdef EXPANDER_HAS_AVX512
const Kernels* kernels_avx512();
#endif

}  // namespace expander
