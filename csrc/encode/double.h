// Full-precision encode and correlate, for gradient checks: plain loops, one sample at a time.
#pragma once

#include "core/args.h"

namespace expander {

size_t double_scratch_bytes(int64_t n, int64_t m);
void encode_double(const EncodeArgs&, int64_t begin, int64_t end, void* scratch);
void correlate_double(const CorrelateArgs&, int64_t begin, int64_t end);

}  // namespace expander
