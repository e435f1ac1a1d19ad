"""Sparse codes by pursuit: solvers on any dictionary, batched, one call form.

    from expander_sae.pursuit import omp
    code = omp(h, sae.dictionary, k=64, block=8, disjoint=True, b_dec=sae.b_dec)

Which to use (docs/theory.md S12): for activations :func:`matching_pursuit` (its default ends with one least-squares
refit) for speed and :func:`omp` for the best residual; to recover a code that is exactly sparse, :func:`omp`.
"""

from __future__ import annotations

from expander_sae.pursuit.code import PursuitCode
from expander_sae.pursuit.combinatorial import expander_recovery, lddsr, parallel_l0, serial_l0
from expander_sae.pursuit.combinatorial_noisy import robust_l0, smp, ssmp
from expander_sae.pursuit.convex import fista, ista
from expander_sae.pursuit.least_squares import refit
from expander_sae.pursuit.matching import gradient_pursuit, matching_pursuit
from expander_sae.pursuit.omp import ols, omp
from expander_sae.pursuit.registry import COMBINATORIAL, SOLVERS, Solver, check_options, options_of, solver
from expander_sae.pursuit.thresholding import cosamp, htp, iht, niht, subspace_pursuit

__all__ = [
    "COMBINATORIAL",
    "SOLVERS",
    "PursuitCode",
    "Solver",
    "check_options",
    "cosamp",
    "expander_recovery",
    "fista",
    "gradient_pursuit",
    "htp",
    "iht",
    "ista",
    "lddsr",
    "matching_pursuit",
    "niht",
    "ols",
    "omp",
    "options_of",
    "parallel_l0",
    "refit",
    "robust_l0",
    "serial_l0",
    "smp",
    "solver",
    "ssmp",
    "subspace_pursuit",
]
