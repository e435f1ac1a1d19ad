// Compiled once per instruction set, beside kernels.cpp; EXPANDER_KERNELS names the table this build defines.
#include "pursuit_matching.h"
#include "pursuit_omp.h"

#define EXPANDER_JOIN_(a, b) a##b
#define EXPANDER_JOIN(a, b) EXPANDER_JOIN_(a, b)

namespace {
const expander::PursuitKernels kPursuitTable = {
    kLanes, matching_scratch_bytes, matching_tile, omp_scratch_bytes, omp_tile,
};
}  // namespace

namespace expander {
const PursuitKernels* EXPANDER_JOIN(pursuit_kernels_, EXPANDER_KERNELS)() { return &kPursuitTable; }
}  // namespace expander
