// The operations: choose an instruction set, share the work among threads, check ranges.
#pragma once

#include "common.h"

namespace expander {

// Names of the instruction sets this build and this processor both have, best first.
const char* const* available_isas();
// Uses the named instruction set from now on; false when it is not available.
bool use_isa(const char* name);
const char* current_isa();

// All throw std::out_of_range when a row is outside [0, m) or an index outside [0, n).
void encode(const EncodeArgs&, int threads);
void correlate(const CorrelateArgs&, int threads);
void decode(const SparseArgs&, int threads);
void correlate_at(const SparseArgs&, int threads);
void values_grad(const SparseArgs&, int threads);
void gram(const SparseArgs&, int threads);
// The step of step.h. `args.out_indices` and `args.out_values` (wide) receive the code; grad_b_dec is (m,) wide.
void train_step(const EncodeArgs& args, StepArgs step, void* grad_b_dec, int threads);

}  // namespace expander
