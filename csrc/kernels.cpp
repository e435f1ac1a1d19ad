// Compiled once per instruction set; EXPANDER_KERNELS names the table this build defines.
#include "common.h"
#include "correlate.h"
#include "encode.h"
#include "sparse.h"

#define EXPANDER_STRING_(x) #x
#define EXPANDER_STRING(x) EXPANDER_STRING_(x)
#define EXPANDER_JOIN_(a, b) a##b
#define EXPANDER_JOIN(a, b) EXPANDER_JOIN_(a, b)

namespace {
const expander::Kernels kTable = {
    EXPANDER_STRING(EXPANDER_KERNELS), tile_width, encode_scratch_bytes, encode_tile,  merge_room,
    merge_partial,                     correlate_scratch_bytes,          correlate_tile, decode,
    correlate_at,                      values_grad,                      gram,           sparse_scratch_bytes,
    rows_in_range,
};
}  // namespace

namespace expander {
const Kernels* EXPANDER_JOIN(kernels_, EXPANDER_KERNELS)() { return &kTable; }
}  // namespace expander
