// The Python module: raw addresses in, checked by expander_sae.ops.cpu, which owns shapes, dtypes and allocation.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "ops.h"
#include "parallel.h"

namespace nb = nanobind;
using namespace expander;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <void (*kOperation)(const SparseArgs&, int)>
void sparse(
    uintptr_t h, uintptr_t indices, uintptr_t code, uintptr_t rows, uintptr_t values, uintptr_t out, int64_t B, int64_t m,
    int64_t n, int64_t d, int64_t k, int dtype, int threads) {
  const SparseArgs args{at<void>(h), at<int32_t>(indices), at<void>(code), at<int32_t>(rows), at<void>(values),
                        at<void>(out), B, m, n, d, k, static_cast<DType>(dtype)};
  const nb::gil_scoped_release release;
  kOperation(args, threads);
}

}  // namespace

void bind_pursuit(nb::module_& module);  // pursuit_module.cpp

NB_MODULE(_kernels, module) {
  bind_pursuit(module);
  parallel_runtime();  // remembers the process it was loaded in
  module.def(
      "encode_topk",
      [](uintptr_t h, uintptr_t rows, uintptr_t values, uintptr_t b_enc, uintptr_t out_indices, uintptr_t out_values,
         int64_t B, int64_t m, int64_t n, int64_t d, int64_t k, int dtype, bool relu, bool magnitude, int threads) {
        const auto type = static_cast<DType>(dtype);
        const EncodeArgs args{at<void>(h), at<int32_t>(rows), at<void>(values), at<void>(b_enc), nullptr,
                              at<int32_t>(out_indices), at<void>(out_values), B, m, n, d, k, type, type, relu, magnitude};
        const nb::gil_scoped_release release;
        encode(args, threads);
      });
  module.def(
      "correlate", [](uintptr_t h, uintptr_t rows, uintptr_t values, uintptr_t out, int64_t B, int64_t m, int64_t n,
                      int64_t d, int dtype, int threads) {
        const CorrelateArgs args{at<void>(h), at<int32_t>(rows), at<void>(values), at<void>(out), B, m, n, d,
                                 static_cast<DType>(dtype)};
        const nb::gil_scoped_release release;
        correlate(args, threads);
      });
  module.def("decode", &sparse<&decode>);
  module.def("correlate_at", &sparse<&correlate_at>);
  module.def("values_grad", &sparse<&values_grad>);
  module.def("gram", &sparse<&gram>);
  module.def(
      "train_step",
      [](uintptr_t h, uintptr_t rows, uintptr_t values, uintptr_t b_enc, uintptr_t b_dec, uintptr_t indices, uintptr_t code,
         uintptr_t residual, uintptr_t errors, uintptr_t grad_values, uintptr_t grad_b_enc, uintptr_t grad_b_dec, int64_t B,
         int64_t m, int64_t n, int64_t d, int64_t k, int dtype, bool relu, int threads) {
        const auto type = static_cast<DType>(dtype);
        const auto wide = type == DType::f64 ? DType::f64 : DType::f32;
        const EncodeArgs args{at<void>(h), at<int32_t>(rows), at<void>(values), at<void>(b_enc), at<void>(b_dec),
                              at<int32_t>(indices), at<void>(code), B, m, n, d, k, type, wide, relu, false};
        const StepArgs step{at<void>(h), at<int32_t>(rows), at<void>(values), at<void>(b_dec), at<int32_t>(indices),
                            at<void>(code), at<void>(residual), at<void>(errors), nullptr, nullptr, at<void>(grad_values),
                            at<void>(grad_b_enc), B, m, n, d, k, type, relu};
        const nb::gil_scoped_release release;
        train_step(args, step, at<void>(grad_b_dec), threads);
      });
  module.def("isas", [] {
    std::vector<std::string> names;
    for (const char* const* name = available_isas(); *name != nullptr; ++name) names.emplace_back(*name);
    return names;
  });
  module.def("isa", [] { return std::string(current_isa()); });
  module.def("use_isa", [](const std::string& name) { return use_isa(name.c_str()); });
  module.def("parallel_runtime", [] { return std::string(parallel_runtime()); });
}
