"""Solvers that keep ``k`` features at all times and exchange them: IHT, NIHT, HTP, CoSaMP, subspace pursuit.

Each keeps a sample's best iterate: a step that does not lower the residual ends that sample. Convergence theory wants
columns far less correlated than a trained dictionary's; on activations OMP is better and faster (docs/theory.md S12).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from expander_sae.dictionary import Dictionary, Matrix
from expander_sae.pursuit import selection
from expander_sae.pursuit.code import PursuitCode
from expander_sae.pursuit.least_squares import solve_support
from expander_sae.pursuit.omp import check_tolerance
from expander_sae.pursuit.problem import Problem, Solution, run, squared_norm

_SLACK, _SHRINK = 0.01, 2.0  # c and kappa of NIHT's step rule
_STALL = 1e-5  # a step that lowers the residual by a smaller fraction than this is the last


class _Iterate(NamedTuple):
    features: Tensor  # int64 (B, k), distinct
    values: Tensor  # (B, k)
    residual: Tensor  # (B, m)


def iht(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    steps: int = 200,
    tol: float | None = None,
    refit: bool = True,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """Iterative hard thresholding (Blumensath & Davies 2009): ``x ← H_k(x + Wᵀr / ‖W‖²)``.

    The fixed step makes it monotone on any dictionary and slow on an overcomplete one; see :func:`niht`.

    Args:
        steps: the most steps.
        refit: finish with least squares on the support.
        h, dictionary, k, tol, b_dec: as :func:`~expander_sae.pursuit.omp.omp`.

    Returns:
        The code, largest coefficient first; ``iterations`` counts steps.
    """
    _check(steps, tol)
    return run(lambda problem: _iht(problem, steps, tol, refit), h, dictionary, k, b_dec)


def niht(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    steps: int = 100,
    tol: float | None = None,
    refit: bool = True,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """Normalised IHT (Blumensath & Davies 2010): the step is the exact line search on the current support.

    A step that changes the support is cut back until it cannot raise the residual. Arguments as :func:`iht`.
    """
    _check(steps, tol)
    return run(lambda problem: _niht(problem, steps, tol, refit, pursue=False), h, dictionary, k, b_dec)


def htp(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    steps: int = 50,
    tol: float | None = None,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """Normalised hard thresholding pursuit (Foucart 2011): NIHT's step, then least squares on the new support.

    Arguments as :func:`iht`; ends when the support repeats or the residual stops falling.
    """
    _check(steps, tol)
    return run(lambda problem: _niht(problem, steps, tol, False, pursue=True), h, dictionary, k, b_dec)


def cosamp(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    steps: int = 20,
    tol: float | None = None,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """CoSaMP (Needell & Tropp 2009): add the ``2k`` best features, solve on all ``3k``, keep the ``k`` largest, refit.

    Wants ``3k ≤ m``; beyond it the ``3k`` columns are dependent and the prune is arbitrary. Arguments as :func:`iht`.
    """
    _check(steps, tol)
    return run(lambda problem: _exchange(problem, 2, steps, tol), h, dictionary, k, b_dec, cells=_exchange_cells(3, k))


def subspace_pursuit(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    steps: int = 20,
    tol: float | None = None,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """Subspace pursuit (Dai & Milenkovic 2009): as :func:`cosamp`, adding ``k`` features per step."""
    _check(steps, tol)
    return run(lambda problem: _exchange(problem, 1, steps, tol), h, dictionary, k, b_dec, cells=_exchange_cells(2, k))


def _check(steps: int, tol: float | None) -> None:
    check_tolerance(tol)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


def _exchange_cells(times: int, k: int):
    width = times * k
    return lambda matrix: 3 * matrix.d_sae + 2 * width * matrix.d_in + 3 * width * width


def _largest(dense: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _, features = selection.best(dense.abs(), k)
    return features, dense.gather(1, features)


def _solution(problem: Problem, best: _Iterate, rounds: Tensor, refit: bool) -> Solution:
    used = best.values != 0
    if not refit:
        return Solution(best.features, best.values, used, rounds)
    values, used = solve_support(problem, best.features, used)
    return Solution(best.features, values, used, rounds)


def _start(problem: Problem) -> _Iterate:
    """Nothing selected, the support that the first step will be measured on in place."""
    features, _ = _largest(problem.matrix.correlate(problem.targets), problem.k)
    return _Iterate(features, torch.zeros_like(features, dtype=problem.targets.dtype), problem.targets)


def _keep(better: Tensor, new: _Iterate, old: _Iterate) -> _Iterate:
    choice = better.unsqueeze(1)
    return _Iterate(*(torch.where(choice, a, b) for a, b in zip(new, old, strict=True)))


def _descend(
    problem: Problem, now: _Iterate, propose: Callable[[_Iterate, Tensor], _Iterate], steps: int, tol: float | None
) -> tuple[_Iterate, Tensor]:
    """Steps of ``propose(now, live)`` for as long as they lower a sample's residual.

    Returns:
        the best iterate of each sample, and the steps it took.
    """
    enough = problem.target_norms(tol)
    norm = now.residual.norm(dim=1)
    live = norm > enough
    rounds = torch.zeros_like(now.features[:, 0])
    for _ in range(steps):
        if not bool(live.any()):
            break
        new = propose(now, live)
        new_norm = new.residual.norm(dim=1)
        better = live & (new_norm < norm)
        now = _keep(better, new, now)
        rounds += live
        live = better & (new_norm < (1 - _STALL) * norm) & (new_norm > enough)
        norm = torch.where(better, new_norm, norm)
    return now, rounds


def _iht(problem: Problem, steps: int, tol: float | None, refit: bool) -> Solution:
    matrix = problem.matrix
    step = 1 / squared_norm(matrix)

    def propose(now: _Iterate, live: Tensor) -> _Iterate:
        dense = (step * matrix.correlate(now.residual)).scatter_add_(1, now.features, now.values)
        features, values = _largest(dense, problem.k)
        return _Iterate(features, values, problem.residual(features, values))

    return _solution(problem, *_descend(problem, _start(problem), propose, steps, tol), refit)


def _niht(problem: Problem, steps: int, tol: float | None, refit: bool, *, pursue: bool) -> Solution:
    matrix, k = problem.matrix, problem.k
    tiny = torch.finfo(problem.targets.dtype).tiny

    def propose(now: _Iterate, live: Tensor) -> _Iterate:
        gradient = matrix.correlate(now.residual)
        on_support = gradient.gather(1, now.features)
        moved = problem.combine(now.features, on_support)
        step = on_support.square().sum(dim=1) / moved.square().sum(dim=1).clamp_min(tiny)
        x = torch.zeros_like(gradient).scatter_add_(1, now.features, now.values)
        pending = live
        new = now
        # At most 40 cuts: the step is then below rounding error, whatever it was.
        for _ in range(40):
            features, values = _largest(x + step.unsqueeze(1) * gradient, k)
            new = _keep(pending, _Iterate(features, values, problem.residual(features, values)), new)
            same = (features.sort(dim=1).values == now.features.sort(dim=1).values).all(dim=1)
            change = torch.zeros_like(x).scatter_add_(1, features, values) - x
            effect = (new.residual - now.residual).square().sum(dim=1).clamp_min(tiny)
            bound = (1 - _SLACK) * change.square().sum(dim=1) / effect
            pending = pending & ~same & (step > bound)
            if not bool(pending.any()):
                break
            step = torch.where(pending, step / (_SHRINK * (1 - _SLACK)), step)
        if not pursue:
            return new
        values, taken = solve_support(problem, new.features, live.unsqueeze(1).expand(-1, k))
        return _Iterate(new.features, values * taken, problem.residual(new.features, values * taken))

    return _solution(problem, *_descend(problem, _start(problem), propose, steps, tol), refit)


def _exchange(problem: Problem, added: int, steps: int, tol: float | None) -> Solution:
    matrix, k = problem.matrix, problem.k
    extra = min(added * k, matrix.d_sae - k)

    def solved(features: Tensor) -> _Iterate:
        values, _ = solve_support(problem, features, torch.ones_like(features, dtype=torch.bool))
        return _Iterate(features, values, problem.residual(features, values))

    def propose(now: _Iterate, live: Tensor) -> _Iterate:
        held = torch.zeros(problem.batch, matrix.d_sae, dtype=torch.bool, device=now.values.device)
        score = selection.scores(
            matrix.correlate(now.residual),
            held.scatter_(1, now.features, True),
            False,
            torch.zeros_like(now.values[:, 0]),
        )
        _, more = selection.best(score, extra)
        pool = torch.cat([now.features, more], dim=1)
        pooled, _ = solve_support(problem, pool, torch.ones_like(pool, dtype=torch.bool))
        _, place = selection.best(pooled.abs(), k)
        return solved(pool.gather(1, place))

    now, rounds = _descend(problem, solved(_start(problem).features), propose, steps - 1 if extra else 0, tol)
    return _solution(problem, now, rounds + 1, False)  # the first solution counts
