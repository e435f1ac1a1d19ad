// Compiled once per instruction set; EXPANDER_KERNELS names the table this build defines.
#include "core/dispatch.h"
#include "encode/correlate.h"
#include "encode/tiles.h"
#include "pursuit/matching.h"
#include "pursuit/omp.h"
#include "sparse/sparse.h"
#include "sparse/step.h"

#define EXPANDER_STRING_(x) #x
#define EXPANDER_STRING(x) EXPANDER_STRING_(x)
#define EXPANDER_JOIN_(a, b) a##b
#define EXPANDER_JOIN(a, b) EXPANDER_JOIN_(a, b)

namespace {
const expander::Kernels kTable = {
    .name = EXPANDER_STRING(EXPANDER_KERNELS),
    .tile_width = tile_width,
    .encode_scratch_bytes = encode_scratch_bytes,
    .encode_tile = encode_tile,
    .merge_room = merge_room,
    .merge_partial = merge_partial,
    .correlate_scratch_bytes = correlate_scratch_bytes,
    .correlate_tile = correlate_tile,
    .decode = decode,
    .correlate_at = correlate_at,
    .values_grad = values_grad,
    .gram = gram,
    .step_samples = step_samples,
    .step_features = step_features,
    .step_scratch_bytes = step_scratch_bytes,
    .sparse_scratch_bytes = sparse_scratch_bytes,
    .rows_in_range = rows_in_range,
    .lanes = kLanes,
    .matching_scratch_bytes = matching_scratch_bytes,
    .matching_tile = matching_tile,
    .omp_scratch_bytes = omp_scratch_bytes,
    .omp_tile = omp_tile,
};
}  // namespace

namespace expander {
const Kernels* EXPANDER_JOIN(kernels_, EXPANDER_KERNELS)() { return &kTable; }
}  // namespace expander
