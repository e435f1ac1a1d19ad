// The Python module: raw addresses in, checked by expander_sae.ops.cpu, which owns shapes, dtypes and allocation. Every
// argument is named on both sides.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bindings/address.h"
#include "core/dispatch.h"
#include "core/operations.h"
#include "core/parallel.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace expander;

namespace {

template <void (*kOperation)(const SparseArgs&, int)>
void sparse(
    uintptr_t h, uintptr_t indices, uintptr_t code, uintptr_t rows, uintptr_t values, uintptr_t out, int64_t B, int64_t m,
    int64_t n, int64_t d, int64_t k, int dtype, int threads) {
  const SparseArgs args{
      .h = at<void>(h),
      .indices = at<int32_t>(indices),
      .code = at<void>(code),
      .rows = at<int32_t>(rows),
      .values = at<void>(values),
      .out = at<void>(out),
      .B = B,
      .m = m,
      .n = n,
      .d = d,
      .k = k,
      .dtype = static_cast<DType>(dtype),
  };
  const nb::gil_scoped_release release;
  kOperation(args, threads);
}

template <void (*kOperation)(const SparseArgs&, int)>
void bind_sparse(nb::module_& module, const char* name) {
  module.def(
      name, &sparse<kOperation>, nb::kw_only(), "h"_a, "indices"_a, "code"_a, "rows"_a, "values"_a, "out"_a, "B"_a, "m"_a,
      "n"_a, "d"_a, "k"_a, "dtype"_a, "threads"_a);
}

// Whether h is finite throughout.
bool encode_topk(
    uintptr_t h, uintptr_t rows, uintptr_t values, uintptr_t b_enc, uintptr_t center, uintptr_t out_indices,
    uintptr_t out_values, int64_t B, int64_t m, int64_t n, int64_t d, int64_t k, int dtype, bool magnitude,
    double threshold, int threads) {
  const auto type = static_cast<DType>(dtype);
  std::atomic<bool> infinite{false};
  const EncodeArgs args{
      .h = at<void>(h),
      .rows = at<int32_t>(rows),
      .values = at<void>(values),
      .b_enc = at<void>(b_enc),
      .center = at<void>(center),
      .out_indices = at<int32_t>(out_indices),
      .out_values = at<void>(out_values),
      .B = B,
      .m = m,
      .n = n,
      .d = d,
      .k = k,
      .dtype = type,
      .out_dtype = type,
      .magnitude = magnitude,
      .threshold = threshold,
      .infinite = &infinite,
  };
  const nb::gil_scoped_release release;
  encode(args, threads);
  return !infinite;
}

void correlate_all(
    uintptr_t h, uintptr_t rows, uintptr_t values, uintptr_t out, int64_t B, int64_t m, int64_t n, int64_t d, int dtype,
    int threads) {
  const CorrelateArgs args{
      .h = at<void>(h),
      .rows = at<int32_t>(rows),
      .values = at<void>(values),
      .out = at<void>(out),
      .B = B,
      .m = m,
      .n = n,
      .d = d,
      .dtype = static_cast<DType>(dtype),
  };
  const nb::gil_scoped_release release;
  correlate(args, threads);
}

void step(
    uintptr_t h, uintptr_t rows, uintptr_t values, uintptr_t b_enc, uintptr_t b_dec, uintptr_t indices, uintptr_t code,
    uintptr_t residual, uintptr_t errors, uintptr_t grad_values, uintptr_t grad_b_enc, uintptr_t grad_b_dec, int64_t B,
    int64_t m, int64_t n, int64_t d, int64_t k, int dtype, bool magnitude, double threshold, int threads) {
  const auto type = static_cast<DType>(dtype);
  const EncodeArgs encoder{
      .h = at<void>(h),
      .rows = at<int32_t>(rows),
      .values = at<void>(values),
      .b_enc = at<void>(b_enc),
      .center = at<void>(b_dec),
      .out_indices = at<int32_t>(indices),
      .out_values = at<void>(code),
      .B = B,
      .m = m,
      .n = n,
      .d = d,
      .k = k,
      .dtype = type,
      .out_dtype = type == DType::f64 ? DType::f64 : DType::f32,
      .magnitude = magnitude,
      .threshold = threshold,
      .infinite = nullptr,
  };
  const StepArgs args{
      .h = at<void>(h),
      .rows = at<int32_t>(rows),
      .values = at<void>(values),
      .b_dec = at<void>(b_dec),
      .indices = at<int32_t>(indices),
      .code = at<void>(code),
      .residual = at<void>(residual),
      .errors = at<void>(errors),
      .code_grad = nullptr,
      .partial = nullptr,
      .grad_values = at<void>(grad_values),
      .grad_b_enc = at<void>(grad_b_enc),
      .B = B,
      .m = m,
      .n = n,
      .d = d,
      .k = k,
      .dtype = type,
      .thresholded = encoder.thresholded(),
  };
  const nb::gil_scoped_release release;
  train_step(encoder, args, at<void>(grad_b_dec), threads);
}

}  // namespace

void bind_pursuit(nb::module_& module);  // bindings/pursuit.cpp

NB_MODULE(_kernels, module) {
  bind_pursuit(module);
  parallel_runtime();  // remembers the process it was loaded in
  module.def(
      "encode", &encode_topk, nb::kw_only(), "h"_a, "rows"_a, "values"_a, "b_enc"_a, "center"_a, "out_indices"_a,
      "out_values"_a, "B"_a, "m"_a, "n"_a, "d"_a, "k"_a, "dtype"_a, "magnitude"_a, "threshold"_a, "threads"_a);
  module.def(
      "correlate", &correlate_all, nb::kw_only(), "h"_a, "rows"_a, "values"_a, "out"_a, "B"_a, "m"_a, "n"_a, "d"_a,
      "dtype"_a, "threads"_a);
  bind_sparse<&decode>(module, "decode");
  bind_sparse<&correlate_at>(module, "correlate_at");
  bind_sparse<&values_grad>(module, "values_grad");
  bind_sparse<&gram>(module, "gram");
  module.def(
      "train_step", &step, nb::kw_only(), "h"_a, "rows"_a, "values"_a, "b_enc"_a, "b_dec"_a, "indices"_a, "code"_a,
      "residual"_a, "errors"_a, "grad_values"_a, "grad_b_enc"_a, "grad_b_dec"_a, "B"_a, "m"_a, "n"_a, "d"_a, "k"_a,
      "dtype"_a, "magnitude"_a, "threshold"_a, "threads"_a);
  module.def("isas", [] {
    std::vector<std::string> names;
    for (const char* const* name = available_isas(); *name != nullptr; ++name) names.emplace_back(*name);
    return names;
  });
  module.def("isa", [] { return std::string(kernels().name); });
  module.def("use_isa", [](const std::string& name) { return use_isa(name.c_str()); });
  module.def("parallel_runtime", [] { return std::string(parallel_runtime()); });
}
