"""Matching pursuit and gradient pursuit: greedy selection without a least-squares solve a round."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from expander_sae.dictionary import Dictionary, Matrix
from expander_sae.pursuit import cpu, selection
from expander_sae.pursuit.code import PursuitCode
from expander_sae.pursuit.least_squares import nonnegative_support, solve_support
from expander_sae.pursuit.omp import check_tolerance
from expander_sae.pursuit.problem import Problem, Solution, run, whole_gram


def matching_pursuit(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    reselect: bool = False,
    refit: bool = True,
    tol: float | None = None,
    nonnegative: bool = False,
    signed: bool = False,
    b_dec: Tensor | None = None,
    backend: str | None = None,
) -> PursuitCode:
    """Matching pursuit (Mallat & Zhang 1993), by default without reselection and with one final least-squares refit.

    On real activations over an expander dictionary MP with one final refit reaches OMP's residual within about 1 % at
    a thirtieth of the arithmetic, because sparse columns rarely overlap. On *exactly* sparse data it is much worse than
    :func:`~expander_sae.pursuit.omp.omp` (relative error .07 against .003 at m=512, k=64): use OMP to recover a planted
    code (docs/theory.md S12).

    Args:
        h: ``(..., m)``, activations.
        dictionary: a dictionary or its matrix; columns need not have unit norm.
        k: selections a sample.
        reselect: a feature may be selected again, its coefficients add up; then fewer than ``k`` features result.
            Without, every feature is taken at most once.
        refit: finish with least squares on the support (non-negative with ``nonnegative``).
        tol: stop a sample once ``‖r‖ ≤ tol · ‖h - b_dec‖``, before the refit.
        nonnegative: positive correlations only. With ``reselect`` coefficients only grow.
        signed: select by the largest signed correlation instead of the magnitude.
        b_dec: ``(m,)``, subtracted from ``h`` first.
        backend: as :func:`~expander_sae.pursuit.omp.omp`; the kernels update correlations instead of recomputing them.

    Returns:
        The code, features in order of their first selection; ``iterations`` counts selections.

    Raises:
        TypeError, ValueError: as :func:`~expander_sae.pursuit.omp.omp`.
    """
    check_tolerance(tol)

    def solve(problem: Problem) -> Solution:
        solution = _matching(problem, reselect, tol, signed or nonnegative, nonnegative)
        if not refit:
            return solution
        final = nonnegative_support if nonnegative else solve_support
        values, used = final(problem, solution.features, solution.used)
        return solution._replace(values=values, used=used)

    options = {"reselect": reselect, "refit": refit, "tol": tol, "signed": signed, "nonnegative": nonnegative}
    fast = partial(cpu.matching_pursuit, k=k, **options)
    return run(solve, h, dictionary, k, b_dec, fast=fast, backend=backend)


def _matching(problem: Problem, reselect: bool, tol: float | None, signed: bool, nonnegative: bool) -> Solution:
    matrix, k = problem.matrix, problem.k
    floor, enough = problem.floor, problem.target_norms(tol)
    residual = problem.targets
    features = torch.zeros(problem.batch, k, dtype=torch.int64, device=residual.device)
    values = residual.new_zeros(problem.batch, k)
    used = torch.zeros_like(features, dtype=torch.bool)
    blocked = torch.zeros(problem.batch, matrix.d_sae, dtype=torch.bool, device=residual.device)
    rounds = torch.zeros_like(features[:, 0])
    live = residual.norm(dim=1) > enough
    gram = whole_gram(matrix, problem.batch * k)
    correlations = matrix.correlate(residual)
    for step in range(k):
        if not bool(live.any()):
            break
        if step and gram is None:
            correlations = matrix.correlate(residual)
        score = selection.scores(correlations, blocked, signed, floor)
        strength, feature = selection.best(score, 1)
        live = live & (strength[:, 0] > 0)
        amount = torch.where(live.unsqueeze(1), correlations.gather(1, feature), 0.0)
        known = used & (features == feature)
        slot = torch.where(known.any(dim=1), known.int().argmax(dim=1), used.sum(dim=1).clamp_max(k - 1)).unsqueeze(1)
        fill = live.unsqueeze(1)
        features.scatter_(1, slot, torch.where(fill, feature, features.gather(1, slot)))
        used.scatter_(1, slot, used.gather(1, slot) | fill)
        values.scatter_add_(1, slot, amount)
        if not reselect:
            blocked.scatter_(1, feature, blocked.gather(1, feature) | fill)
        residual = residual - amount * matrix.columns(feature.squeeze(1))
        if gram is not None:
            correlations.addcmul_(amount, gram[feature.squeeze(1)], value=-1)
        rounds += live
        live = live & (residual.norm(dim=1) > enough)
    return Solution(features, values, used, rounds)


def gradient_pursuit(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    steps: int = 1,
    tol: float | None = None,
    nonnegative: bool = False,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """Gradient pursuit (Blumensath & Davies 2008): gradient steps on the support instead of a least-squares solve.

    Each step goes along the residual's gradient on the support with the exact line search. With ``nonnegative`` this is
    what "inference-time optimisation" of SAE codes uses: coefficients are clipped at 0 after each step.

    Args:
        steps: gradient steps a selection; two or three come close to OMP (docs/theory.md S5).
        h, dictionary, k, tol, nonnegative, b_dec: as :func:`~expander_sae.pursuit.omp.omp`.

    Returns:
        The code; a coefficient that was clipped may be 0. ``iterations`` counts selections.
    """
    check_tolerance(tol)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return run(lambda problem: _gradient(problem, steps, tol, nonnegative), h, dictionary, k, b_dec)


def _gradient(problem: Problem, steps: int, tol: float | None, nonnegative: bool) -> Solution:
    matrix, k = problem.matrix, problem.k
    floor, enough = problem.floor, problem.target_norms(tol)
    residual = problem.targets
    features = torch.zeros(problem.batch, k, dtype=torch.int64, device=residual.device)
    x = residual.new_zeros(problem.batch, k)
    used = torch.zeros_like(features, dtype=torch.bool)
    blocked = torch.zeros(problem.batch, matrix.d_sae, dtype=torch.bool, device=residual.device)
    live = residual.norm(dim=1) > enough
    for selected in range(k):
        score = selection.scores(matrix.correlate(residual), blocked, nonnegative, floor)
        strength, feature = selection.best(score, 1)
        live = live & (strength[:, 0] > 0)
        if not bool(live.any()):
            break
        # A sample that is done never becomes live again, so every live one has `selected` features.
        features[:, selected] = torch.where(live, feature[:, 0], 0)
        used[:, selected] = live
        blocked.scatter_(1, feature, blocked.gather(1, feature) | live.unsqueeze(1))
        for _ in range(steps):
            slope = matrix.correlate_at(residual, features.to(torch.int32)) * used
            if nonnegative:
                slope = slope.masked_fill((x <= 0) & (slope < 0), 0.0)
            direction = problem.combine(features, slope)
            curvature = direction.square().sum(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
            size = torch.where(live, (residual * direction).sum(dim=1) / curvature, 0.0)
            x = x + size.unsqueeze(1) * slope
            x = x.clamp_min(0) if nonnegative else x
            residual = problem.residual(features, x)
        live = live & (residual.norm(dim=1) > enough)
    return Solution(features, x, used, used.sum(dim=1))
