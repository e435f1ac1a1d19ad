// The pursuits in the Python module: raw addresses in, checked by expander_sae.pursuit.cpu.
#include <nanobind/nanobind.h>

#include "bindings/address.h"
#include "core/operations.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace expander;

namespace {

template <void (*kPursuit)(const PursuitArgs&, int)>
void pursue(
    uintptr_t h, uintptr_t rows, uintptr_t values, uintptr_t norms, uintptr_t indices, uintptr_t code,
    uintptr_t residual_norms, uintptr_t iterations, uintptr_t used, int64_t B, int64_t m, int64_t n, int64_t d, int64_t k,
    float tol, bool positive, bool nonnegative, int64_t block, bool disjoint, bool reselect, bool refit, int threads) {
  const PursuitArgs args{
      .h = at<float>(h),
      .rows = at<int32_t>(rows),
      .values = at<float>(values),
      .norms = at<float>(norms),
      .indices = at<int32_t>(indices),
      .code = at<float>(code),
      .residual_norms = at<float>(residual_norms),
      .iterations = at<int32_t>(iterations),
      .used = at<int32_t>(used),
      .B = B,
      .m = m,
      .n = n,
      .d = d,
      .k = k,
      .tol = tol,
      .positive = positive,
      .nonnegative = nonnegative,
      .block = block,
      .disjoint = disjoint,
      .reselect = reselect,
      .refit = refit,
  };
  const nb::gil_scoped_release release;
  kPursuit(args, threads);
}

// The options of the other pursuit have defaults: they mean nothing to this one.
template <void (*kPursuit)(const PursuitArgs&, int)>
void bind(nb::module_& module, const char* name) {
  module.def(
      name, &pursue<kPursuit>, nb::kw_only(), "h"_a, "rows"_a, "values"_a, "norms"_a, "indices"_a, "code"_a,
      "residual_norms"_a, "iterations"_a, "used"_a, "B"_a, "m"_a, "n"_a, "d"_a, "k"_a, "tol"_a, "positive"_a,
      "nonnegative"_a, "block"_a = 1, "disjoint"_a = false, "reselect"_a = false, "refit"_a = false, "threads"_a);
}

}  // namespace

void bind_pursuit(nb::module_& module) {
  bind<&orthogonal_matching_pursuit>(module, "omp");
  bind<&matching_pursuit>(module, "matching_pursuit");
}
