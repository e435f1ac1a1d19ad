"""The ℓ1 way: ISTA and FISTA, then the ``k`` largest coefficients, refitted."""

from __future__ import annotations

import torch
from torch import Tensor

from expander_sae.dictionary import Dictionary, Matrix
from expander_sae.pursuit import selection
from expander_sae.pursuit.code import PursuitCode
from expander_sae.pursuit.least_squares import nonnegative_support, solve_support
from expander_sae.pursuit.problem import Problem, Solution, run, squared_norm


def ista(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    penalty: float = 0.05,
    steps: int = 200,
    nonnegative: bool = False,
    refit: bool = True,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """Iterative soft thresholding (Daubechies, Defrise & De Mol 2004) on ``½‖h - Wx‖² + λ‖x‖₁``.

    Args:
        penalty: ``λ`` as a fraction, in ``(0, 1)``, of ``max|Wᵀh|``, at which a sample's code is zero.
        steps: steps of size ``1 / ‖W‖²``; a sample ends when its code stands still.
        nonnegative: ``x ≥ 0`` throughout.
        refit: least squares on the ``k`` largest coefficients, which undoes the shrinkage.
        h, dictionary, k, b_dec: as :func:`~expander_sae.pursuit.omp.omp`.

    Returns:
        The code, largest coefficient (before the refit) first; ``iterations`` counts steps.
    """
    return _run(h, dictionary, k, penalty, steps, nonnegative, refit, b_dec, momentum=False)


def fista(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    penalty: float = 0.05,
    steps: int = 100,
    nonnegative: bool = False,
    refit: bool = True,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """FISTA (Beck & Teboulle 2009), restarted by gradients (O'Donoghue & Candès 2015). Arguments as :func:`ista`."""
    return _run(h, dictionary, k, penalty, steps, nonnegative, refit, b_dec, momentum=True)


def _run(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    penalty: float,
    steps: int,
    nonnegative: bool,
    refit: bool,
    b_dec: Tensor | None,
    *,
    momentum: bool,
) -> PursuitCode:
    if not 0 < penalty < 1:
        raise ValueError(f"penalty is a fraction of the one that makes the code zero, between 0 and 1; got {penalty}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")

    def solve(problem: Problem) -> Solution:
        x, rounds = _proximal(problem, penalty, steps, nonnegative, momentum)
        strength, features = selection.best(x.abs(), k)
        used = strength > 0
        values = x.gather(1, features)
        if refit:
            values, used = (nonnegative_support if nonnegative else solve_support)(problem, features, used)
        return Solution(features, values, used, rounds)

    return run(solve, h, dictionary, k, b_dec, cells=lambda matrix: 8 * matrix.d_sae + 2 * k * matrix.d_in + 3 * k * k)


def _proximal(problem: Problem, penalty: float, steps: int, nonnegative: bool, momentum: bool) -> tuple[Tensor, Tensor]:
    matrix, targets = problem.matrix, problem.targets
    combine = matrix.synthesis()
    correlations = matrix.correlate(targets)
    top = (correlations if nonnegative else correlations.abs()).amax(dim=1, keepdim=True).clamp_min(0)
    size = 1 / squared_norm(matrix)
    threshold = size * penalty * top
    still = torch.finfo(targets.dtype).eps * top
    x = torch.zeros_like(correlations)
    point, age = x, torch.ones_like(top)
    rounds = torch.zeros(problem.batch, dtype=torch.int64, device=targets.device)
    live = top > problem.floor.unsqueeze(1)
    for _ in range(steps):
        if not bool(live.any()):
            break
        moved = point + size * matrix.correlate(targets - combine(point))
        new = (moved - threshold).clamp_min(0)
        if not nonnegative:
            new = new - (-moved - threshold).clamp_min(0)
        new = torch.where(live, new, x)
        change = new - x
        if momentum:
            restart = ((point - new) * change).sum(dim=1, keepdim=True) > 0
            age = torch.where(restart, 1.0, age)
            older = (1 + (1 + 4 * age.square()).sqrt()) / 2
            point, age = new + (age - 1) / older * change, older
        else:
            point = new
        x = new
        rounds += live.squeeze(1)
        live = live & (change.abs().amax(dim=1, keepdim=True) > still)
    return x, rounds
