"""Orthogonal matching pursuit: block, row-disjoint, non-negative, and orthogonal least squares."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from expander_sae.dictionary import Dictionary, Matrix
from expander_sae.pursuit import cpu, selection
from expander_sae.pursuit.code import PursuitCode
from expander_sae.pursuit.least_squares import ActiveSet, nonnegative_step, pivot_floor
from expander_sae.pursuit.problem import Problem, Solution, as_matrix, run, supports


def omp(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    block: int = 1,
    disjoint: bool = False,
    tol: float | None = None,
    nonnegative: bool = False,
    signed: bool = False,
    b_dec: Tensor | None = None,
    backend: str | None = None,
) -> PursuitCode:
    """Orthogonal matching pursuit: rounds of selection by correlation with the residual and a refit.

    ``block=1`` is OMP (Pati, Rezaiifar & Krishnaprasad 1993), ``block=k`` one-shot selection with a refit, values
    between are generalised OMP (Wang, Kwon & Shim 2012) and the paper's Table 5. On overlapping columns the best ``L``
    of a round are near-duplicates; ``disjoint=True`` makes a round's columns share no row, which costs nothing and
    loses little against ``block=1`` (docs/theory.md S3).

    Scores are ``|⟨w_j, r⟩| / ‖w_j‖``, ties go to the lower index. A column that depends on the support is passed over
    and the pursuit goes on with the next best; a zero column is never taken.

    Args:
        h: ``(..., m)``, activations.
        dictionary: a dictionary or its matrix; columns need not have unit norm.
        k: the most features per sample.
        block: features a round, ``L``; the last round takes what is left.
        disjoint: take the best row-disjoint features of a round (expander dictionaries only). Where a round finds
            fewer than ``block`` disjoint ones, the best of the others fill it.
        tol: stop a sample once ``‖r‖ ≤ tol · ‖h - b_dec‖``; ``None`` stops at rounding error only.
        nonnegative: positive correlations only, and non-negative least squares on the support (Lawson & Hanson 1974),
            which may drop features again; a dropped one may come back.
        signed: select by the largest signed correlation, as the paper's implementation does; coefficients stay free.
        b_dec: ``(m,)``, subtracted from ``h`` first.
        backend: ``None`` takes the C++ kernels where they apply (an expander dictionary on the CPU, in float32) and
            PyTorch elsewhere; ``"reference"`` takes PyTorch, ``"cpu"`` the kernels or an error.

    Returns:
        The code, features in order of selection; ``iterations`` counts rounds.

    Raises:
        TypeError, ValueError: see :func:`expander_sae.pursuit.problem.run`; ``block`` outside ``[1, k]``; ``tol``
            negative or not finite; ``disjoint`` on a dense dictionary.
    """
    if not 1 <= block <= max(k, 1):  # k itself is checked with the other inputs
        raise ValueError(f"block must be between 1 and k = {k}, got {block}")
    check_tolerance(tol)
    matrix = as_matrix(dictionary)
    if disjoint and matrix.support is None:
        raise ValueError("disjoint=True keeps the rows of a round's columns apart: it needs an expander dictionary")

    def solve(problem: Problem) -> Solution:
        if nonnegative:
            return _nonnegative_omp(problem, block, disjoint, tol)
        return _omp(problem, block, disjoint, tol, signed)

    options = {"k": k, "block": block, "disjoint": disjoint, "tol": tol, "signed": signed, "nonnegative": nonnegative}
    fast = partial(cpu.omp, **options)
    return run(solve, h, matrix, k, b_dec, rounds=-(-k // block), fast=fast, backend=backend)


def check_tolerance(tol: float | None) -> None:
    """Raise unless ``tol`` is ``None`` or a finite number that is not negative."""
    if tol is not None and not 0 <= tol < float("inf"):
        raise ValueError(f"tol is a fraction of the sample's norm, at least 0; got {tol}")


def _candidates(problem: Problem, score: Tensor, count: int, disjoint: bool) -> tuple[Tensor, Tensor]:
    if disjoint:
        return selection.best_disjoint(score, count, supports(problem.matrix), problem.floor)
    return selection.best(score, count)


def _omp(problem: Problem, block: int, disjoint: bool, tol: float | None, signed: bool) -> Solution:
    active = ActiveSet(problem)
    floor, enough = problem.floor.unsqueeze(1), problem.target_norms(tol)
    residual = problem.targets
    tried = active.features[:, :0]  # taken or dependent: not looked at again
    rounds = torch.zeros_like(active.count)
    live = residual.norm(dim=1) > enough
    while bool(live.any()):
        correlations = active.correlations(residual)
        score = correlations if signed else correlations.abs_()
        strength, features = _candidates(problem, score.scatter_(1, tried, -1.0), block, disjoint)
        wanted = live.unsqueeze(1) & (strength > floor)
        # A dependent column takes a place of the round, too.
        wanted &= torch.arange(block, device=wanted.device) < (problem.k - active.count).unsqueeze(1)
        live = wanted[:, 0]
        for place in range(block):
            active.append(features[:, place], wanted[:, place])
        tried = torch.cat([tried, torch.where(wanted, features, features[:, :1])], dim=1)
        residual = active.residual()
        rounds += live
        live = live & (active.count < problem.k) & (residual.norm(dim=1) > enough)
    return Solution(active.features, active.refined(), active.used, rounds)


def _nonnegative_omp(problem: Problem, block: int, disjoint: bool, tol: float | None) -> Solution:
    targets, k, batch = problem.targets, problem.k, problem.batch
    floor, enough = problem.floor.unsqueeze(1), problem.target_norms(tol)
    features = torch.zeros(batch, k, dtype=torch.int64, device=targets.device)
    stamp = torch.zeros_like(features)  # when a slot was filled: the order of the code
    active = torch.zeros_like(features, dtype=torch.bool)
    gram = targets.new_zeros(batch, k, k)
    right, x = targets.new_zeros(batch, k), targets.new_zeros(batch, k)
    residual = targets
    futile = torch.zeros_like(problem.correlations)  # -∞ for a feature that rounding alone made look useful
    rounds = torch.zeros_like(features[:, 0])
    live = residual.norm(dim=1) > enough
    sample = torch.arange(batch, device=targets.device)
    clock = width = 0
    # Every step lowers the residual over a new support, so this ends; Lawson & Hanson cap it at 3k like everyone after.
    for _ in range(3 * k):
        if not bool(live.any()):
            break
        score = problem.correlate(features[:, :width], x[:, :width], residual).add_(futile)
        score.scatter_reduce_(1, features, torch.where(active, -1.0, torch.inf).to(score.dtype), "amin")
        strength, chosen = _candidates(problem, score, block, disjoint)
        worthy = live.unsqueeze(1) & (strength > floor)
        live = worthy[:, 0]
        rounds += live
        for place in range(block):
            feature = chosen[:, place, None]
            # Earlier columns of this block may have explained what this one promised.
            useful = (problem.matrix.columns(chosen[:, place]) * residual).sum(dim=1, keepdim=True) > floor
            wanted = worthy[:, place, None] & useful & ~active.all(dim=1, keepdim=True)
            slot = active.to(torch.int8).argmin(dim=1)
            clock += 1
            width = min(clock, k)  # slots in use so far: a free one is taken from below
            entering = torch.zeros_like(active).scatter_(1, slot.unsqueeze(1), wanted)
            features, stamp = torch.where(entering, feature, features), torch.where(entering, clock, stamp)
            right = torch.where(entering, problem.correlations.gather(1, feature), right)
            products = problem.products(feature, features)
            gram[sample, slot] = torch.where(wanted, products, gram[sample, slot])
            gram[sample, :, slot] = torch.where(wanted, products, gram[sample, :, slot])
            tried, known = (active | entering)[:, :width], x[:, :width]
            solved, kept = nonnegative_step(gram[:, :width, :width], right[:, :width], tried, known)
            x[:, :width] = torch.where(wanted, solved, known)
            active[:, :width] = torch.where(wanted, kept, active[:, :width])
            rejected = wanted & ~active.gather(1, slot.unsqueeze(1))
            futile.scatter_add_(1, feature, torch.where(rejected, -torch.inf, 0.0).to(futile.dtype))
            residual = problem.residual(features[:, :width], x[:, :width])
        live = live & ~active.all(dim=1) & (residual.norm(dim=1) > enough)
    order = torch.where(active, stamp, torch.iinfo(torch.int64).max).argsort(dim=1)
    return Solution(features.gather(1, order), x.gather(1, order), active.gather(1, order), rounds)


def ols(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    tol: float | None = None,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """Orthogonal least squares (Chen, Billings & Luo 1989): take the column that lowers the refitted residual most.

    The score is ``⟨w_j, r⟩² / ‖P⊥ w_j‖²``: OMP's, with the column's own distance to the span of the support below it.
    Costs one correlation per step, of the new orthonormal direction (docs/theory.md S4). Otherwise as :func:`omp`.
    """
    check_tolerance(tol)
    return run(lambda problem: _ols(problem, tol), h, dictionary, k, b_dec, rounds=k)


def _ols(problem: Problem, tol: float | None) -> Solution:
    active = ActiveSet(problem)
    floor, enough = problem.floor.unsqueeze(1), problem.target_norms(tol)
    correlations = problem.correlations.clone()
    distance = torch.ones_like(correlations)  # ‖P⊥ w_j‖², infinite for columns taken or dependent
    rounds = torch.zeros_like(active.count)
    live = problem.targets.norm(dim=1) > enough
    while bool(live.any()):
        gain = torch.where(correlations.abs() > floor, correlations.square().div_(distance), -1.0)
        strength, feature = selection.best(gain, 1)
        live = live & (strength[:, 0] > 0)
        active.append(feature.squeeze(1), live)
        distance.scatter_(1, feature, torch.inf)
        # The residual moves along the new orthonormal direction only.
        turned = problem.correlate_code(active.features[:, : active.width], active.direction)
        correlations.addcmul_(active.amount, turned, value=-1)
        distance.addcmul_(turned, turned, value=-1)
        F.threshold(distance, pivot_floor(distance.dtype), torch.inf, inplace=True)
        rounds += live
        live = live & (active.count < problem.k) & (active.residual().norm(dim=1) > enough)
    return Solution(active.features, active.refined(), active.used, rounds)
