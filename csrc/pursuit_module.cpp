// The pursuits in the Python module: raw addresses in, checked by expander_sae.pursuit.cpu.
#include <nanobind/nanobind.h>

#include "pursuit.h"

namespace nb = nanobind;
using namespace expander;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_pursuit(nb::module_& module) {
  module.def("omp", [](uintptr_t h, uintptr_t rows, uintptr_t values, uintptr_t norms, uintptr_t indices, uintptr_t code,
                       uintptr_t residual_norms, uintptr_t iterations, uintptr_t used, int64_t B, int64_t m, int64_t n,
                       int64_t d, int64_t k, float tol, bool positive, bool nonnegative, int64_t block, bool disjoint,
                       int threads) {
    const PursuitArgs args{at<float>(h), at<int32_t>(rows), at<float>(values), at<float>(norms), at<int32_t>(indices),
                           at<float>(code), at<float>(residual_norms), at<int32_t>(iterations), at<int32_t>(used),
                           B, m, n, d, k, tol, positive, nonnegative, block, disjoint, false, false};
    const nb::gil_scoped_release release;
    orthogonal_matching_pursuit(args, threads);
  });
  module.def("matching_pursuit", [](uintptr_t h, uintptr_t rows, uintptr_t values, uintptr_t norms, uintptr_t indices,
                                    uintptr_t code, uintptr_t residual_norms, uintptr_t iterations, uintptr_t used,
                                    int64_t B, int64_t m, int64_t n, int64_t d, int64_t k, float tol, bool positive,
                                    bool nonnegative, bool reselect, bool refit, int threads) {
    const PursuitArgs args{at<float>(h), at<int32_t>(rows), at<float>(values), at<float>(norms), at<int32_t>(indices),
                           at<float>(code), at<float>(residual_norms), at<int32_t>(iterations), at<int32_t>(used),
                           B, m, n, d, k, tol, positive, nonnegative, 1, false, reselect, refit};
    const nb::gil_scoped_release release;
    matching_pursuit(args, threads);
  });
}
