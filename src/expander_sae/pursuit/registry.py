"""The solvers by name, in one call form: what ``sae.with_encoder("omp", block=8)`` and the experiments look up."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import NoneType
from typing import Any, get_args, get_type_hints

from expander_sae.pursuit.code import PursuitCode
from expander_sae.pursuit.combinatorial import expander_recovery, lddsr, parallel_l0, serial_l0
from expander_sae.pursuit.combinatorial_noisy import robust_l0, smp, ssmp
from expander_sae.pursuit.convex import fista, ista
from expander_sae.pursuit.matching import gradient_pursuit, matching_pursuit
from expander_sae.pursuit.omp import ols, omp
from expander_sae.pursuit.thresholding import cosamp, htp, iht, niht, subspace_pursuit
from expander_sae.registry import Registry
from expander_sae.registry import check_options as check_names

Solver = Callable[..., PursuitCode]
"""``solver(h, dictionary, k, b_dec=..., **options)``; which options there are is :func:`options_of`."""

SOLVERS: Registry[Solver] = Registry("solver")
"""Name to solver."""
for _name, _solver in (
    ("omp", omp),
    ("ols", ols),
    ("matching-pursuit", matching_pursuit),
    ("gradient-pursuit", gradient_pursuit),
    ("iht", iht),
    ("niht", niht),
    ("htp", htp),
    ("cosamp", cosamp),
    ("subspace-pursuit", subspace_pursuit),
    ("ista", ista),
    ("fista", fista),
    ("parallel-l0", parallel_l0),
    ("serial-l0", serial_l0),
    ("robust-l0", robust_l0),
    ("smp", smp),
    ("ssmp", ssmp),
    ("expander-recovery", expander_recovery),
    ("lddsr", lddsr),
):
    SOLVERS.add(_name, _solver)

COMBINATORIAL = ("parallel-l0", "serial-l0", "robust-l0", "smp", "ssmp", "expander-recovery", "lddsr")
"""Decoders of exactly sparse data on sparse columns: they refuse dense ones, and cannot decode activations."""

_NOT_OPTIONS = ("h", "dictionary", "k", "b_dec")


def solver(name: str) -> Solver:
    """The solver called ``name``. Raises ``ValueError`` for an unknown one; the known ones are listed."""
    return SOLVERS[name]


def options_of(name: str) -> dict[str, Any]:
    """The options of a solver with their defaults, without ``h``, ``dictionary``, ``k`` and ``b_dec``."""
    parameters = inspect.signature(solver(name)).parameters
    return {key: value.default for key, value in parameters.items() if key not in _NOT_OPTIONS}


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raise :class:`ValueError` if ``options`` names something the solver does not take, or of another type."""
    check_names(f"solver {name!r}", options, options_of(name))
    hints = get_type_hints(solver(name))
    for option, value in options.items():
        kinds = get_args(hints[option]) or (hints[option],)
        if not _fits(value, kinds):
            wanted = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"option {option!r} of solver {name!r} must be {wanted}, got {value!r}")


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return int in kinds or float in kinds
    return type(value) in kinds
