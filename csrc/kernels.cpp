// Compiled once per instruction set; EXPANDER_KERNELS names the table this build defines.
#include "common.h"
#include "correlate.h"
#include "encode.h"
#include "sparse.h"
#include "step.h"

#define EXPANDER_STRING_(x) #x
#define EXPANDER_STRING(x) EXPANDER_STRING_(x)
#define EXPANDER_JOIN_(a, b) a##b
#define EXPANDER_JOIN(a, b) EXPANDER_JOIN_(a, b)

namespace {
expander::Kernels table() {
  expander::Kernels t{};
  t.name = EXPANDER_STRING(EXPANDER_KERNELS);
  t.tile_width = tile_width;
  t.encode_scratch_bytes = encode_scratch_bytes;
  t.encode_tile = encode_tile;
  t.merge_room = merge_room;
  t.merge_partial = merge_partial;
  t.correlate_scratch_bytes = correlate_scratch_bytes;
  t.correlate_tile = correlate_tile;
  t.decode = decode;
  t.correlate_at = correlate_at;
  t.values_grad = values_grad;
  t.gram = gram;
  t.sparse_scratch_bytes = sparse_scratch_bytes;
  t.step_samples = step_samples;
  t.step_features = step_features;
  t.step_scratch_bytes = step_scratch_bytes;
  t.rows_in_range = rows_in_range;
  return t;
}
}  // namespace

namespace expander {
const Kernels* EXPANDER_JOIN(kernels_, EXPANDER_KERNELS)() {
  static const Kernels kTable = table();
  return &kTable;
}
}  // namespace expander
