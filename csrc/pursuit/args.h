// Pursuits on an expander dictionary: argument records.
#pragma once

#include <cstdint>

namespace expander {

struct PursuitArgs {
  const float* h;        // (B, m)
  const int32_t* rows;   // (n, d)
  const float* values;   // (n, d), unit columns or zero columns
  const float* norms;    // (n,), what the columns were divided by
  int32_t* indices;      // (B, k), in order of selection; unused slots are left as they are (the caller zeroes them)
  float* code;           // (B, k)
  float* residual_norms; // (B,)
  int32_t* iterations;   // (B,)
  int32_t* used;         // (B,), features in the code; -1 for a sample with entries that are not finite
  int64_t B, m, n, d, k;
  float tol;             // of the sample's norm; negative: stop at rounding error only
  bool positive;         // select by signed correlation instead of the magnitude
  bool nonnegative;      // coefficients >= 0 (with positive)
  // omp
  int64_t block;
  bool disjoint;
  // matching pursuit
  bool reselect, refit;
};

// W by rows: row i holds the columns column[start[i]] ... column[start[i + 1] - 1] with their entries, filled up to a
// multiple of kRowPadding with entries 0 of a column n that does not exist.
constexpr int kRowPadding = 8;
struct ByRow {
  const int64_t* start;   // (m + 1,)
  const int32_t* column;
  const float* value;
};

}  // namespace expander
