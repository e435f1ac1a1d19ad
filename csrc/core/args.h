// What the Python module, the drivers and the per-instruction-set kernels share: the argument records.
//
// Notation is the Python side's: h (B, m), rows int32 (n, d), values (n, d), indices int32 (B, k). Every array is
// contiguous. All products of sizes are taken in 64 bits.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>

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
  bool magnitude;    // rank |z|, give z
  double threshold;  // a score up to it leaves its slot empty (index 0, value 0); -inf: none does
  std::atomic<bool>* infinite;  // set when h holds NaN or infinity, or null

  bool thresholded() const { return threshold > -std::numeric_limits<double>::infinity(); }
  bool empties(double score) const { return thresholded() && score <= threshold; }
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
  bool thresholded;  // a slot with value 0 is empty and passes no gradient
};

// Samples summed in one go: sums over the batch are taken chunk by chunk whatever the number of threads.
constexpr int64_t kStepChunk = 16;
// Samples whose residuals are made and then read again for the gradients while they are in the cache.
constexpr int64_t kStepWindow = 8 * kStepChunk;

}  // namespace expander
