// The operations the Python module offers: they share the work among threads and check ranges.
#pragma once

#include "core/args.h"
#include "pursuit/args.h"

namespace expander {

// All throw std::out_of_range when a row is outside [0, m) or an index outside [0, n).
void encode(const EncodeArgs&, int threads);
void correlate(const CorrelateArgs&, int threads);
void decode(const SparseArgs&, int threads);
void correlate_at(const SparseArgs&, int threads);
void values_grad(const SparseArgs&, int threads);
void gram(const SparseArgs&, int threads);
// The step of step.h. `args.out_indices` and `args.out_values` (wide) receive the code; grad_b_dec is (m,) wide.
void train_step(const EncodeArgs& args, StepArgs step, void* grad_b_dec, int threads);

// Pursuits; bits do not depend on the number of threads.
void matching_pursuit(const PursuitArgs&, int threads);
void orthogonal_matching_pursuit(const PursuitArgs&, int threads);

}  // namespace expander
