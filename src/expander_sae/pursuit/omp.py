"""Orthogonal matching pursuit: block, row-disjoint, non-negative, and orthogonal least squares."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from expander_sae.dictionary import Dictionary, ExpanderMatrix, Matrix
from expander_sae.pursuit import cpu, selection
from expander_sae.pursuit.code import PursuitCode
from expander_sae.pursuit.least_squares import ActiveSet, nonnegative_step, pivot_floor
from expander_sae.pursuit.problem import Problem, Solution, as_matrix, run


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
    loses little against ``block=1`` (THEORY C.3, C.10).

    Scores are ``|⟨w_j, r⟩| / ‖w_j‖``, ties go to the lower index. A column that depends on the support is passed over
    and the pursuit goes on with the next best; a zero column is never taken.

    Args:
        h: ``(..., m)``, activations.
        dictionary: a dictionary or its matrix; columns need not have unit norm.
        k: the most features a sample.
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
    if disjoint and not isinstance(matrix, ExpanderMatrix):
        raise ValueError("disjoint=True keeps the rows of a round's columns apart: it needs an expander dictionary")

    def solve(problem: Problem) -> Solution:
        if nonnegative:
            return _nonnegative_omp(problem, block, disjoint, tol)
        return _omp(problem, block, disjoint, tol, signed)

    options = {"k": k, "block": block, "disjoint": disjoint, "tol": tol, "signed": signed, "nonnegative": nonnegative}
    fast = partial(cpu.omp, **options)
    return run(solve, h, matrix, k, b_dec, fast=fast, backend=backend)


def check_tolerance(tol: float | None) -> None:
    """Raise unless ``tol`` is ``None`` or a finite number that is not negative."""
    if tol is not None and not 0 <= tol < float("inf"):
        raise ValueError(f"tol is a fraction of the sample's norm, at least 0; got {tol}")


def _candidates(problem: Problem, score: Tensor, count: int, disjoint: bool) -> tuple[Tensor, Tensor]:
    if disjoint and isinstance(problem.matrix, ExpanderMatrix):
        return selection.best_disjoint(score, count, problem.matrix)
    return selection.best(score, count)


def _omp(problem: Problem, block: int, disjoint: bool, tol: float | None, signed: bool) -> Solution:
    active = ActiveSet(problem)
    floor, enough = problem.floor, problem.target_norms(tol)
    residual = problem.targets
    blocked = torch.zeros(problem.batch, problem.matrix.d_sae, dtype=torch.bool, device=residual.device)
    rounds = torch.zeros_like(active.count)
    live = residual.norm(dim=1) > enough
    while bool(live.any()):
        score = selection.scores(problem.matrix.correlate(residual), blocked, signed, floor)
        strength, features = _candidates(problem, score, block, disjoint)
        live = live & (strength[:, 0] > 0)
        room = problem.k - active.count  # what the round may look at: a dependent column takes a place, too
        for place in range(block):
            feature = features[:, place]
            wanted = live & (room > place) & (strength[:, place] > 0)
            active.append(feature, wanted)
            # Taken or dependent, a feature is not looked at again.
            blocked.scatter_(1, feature.unsqueeze(1), blocked.gather(1, feature.unsqueeze(1)) | wanted.unsqueeze(1))
        residual = active.residual()
        rounds += live
        live = live & (active.count < problem.k) & (residual.norm(dim=1) > enough)
    return Solution(active.features, active.refined(), active.used, rounds)


def _nonnegative_omp(problem: Problem, block: int, disjoint: bool, tol: float | None) -> Solution:
    matrix, targets, k = problem.matrix, problem.targets, problem.k
    batch, device = problem.batch, targets.device
    floor, enough = problem.floor, problem.target_norms(tol)
    features = torch.zeros(batch, k, dtype=torch.int64, device=device)
    active = torch.zeros(batch, k, dtype=torch.bool, device=device)
    gram = torch.eye(k, dtype=targets.dtype, device=device).repeat(batch, 1, 1)
    right, x = targets.new_zeros(batch, k), targets.new_zeros(batch, k)
    stamp = torch.zeros(batch, k, dtype=torch.int64, device=device)  # when a slot was filled: the order of the code
    futile = torch.zeros(batch, matrix.d_sae, dtype=torch.bool, device=device)
    residual = targets
    rounds = torch.zeros(batch, dtype=torch.int64, device=device)
    live = residual.norm(dim=1) > enough
    sample = torch.arange(batch, device=device)
    clock = 0
    # Every step lowers the residual over a new support, so this ends; Lawson & Hanson cap it at 3k like everyone after.
    for _ in range(3 * k):
        blocked = futile.scatter(1, features, futile.gather(1, features) | active)
        score = selection.scores(matrix.correlate(residual), blocked, True, floor)
        strength, chosen = _candidates(problem, score, block, disjoint)
        live = live & (strength[:, 0] > 0)
        if not bool(live.any()):
            break
        rounds += live
        for place in range(block):
            feature = chosen[:, place]
            column = matrix.columns(feature)
            # Earlier columns of this block may have explained what this one promised.
            useful = (column * residual).sum(dim=1) > floor
            wanted = live & useful & (strength[:, place] > 0) & ~active.all(dim=1)
            slot = active.to(torch.int8).argmin(dim=1)
            clock += 1
            rows, cols = sample[wanted], slot[wanted]
            features[rows, cols], stamp[rows, cols] = feature[wanted], clock
            products = matrix.correlate_at(column, features.to(torch.int32))
            gram[rows, cols] = products[wanted]
            gram[rows, :, cols] = products[wanted]
            right[rows, cols] = (column * targets).sum(dim=1)[wanted]
            entering = torch.zeros_like(active)
            entering[rows, cols] = True
            solved, kept = nonnegative_step(gram, right, active | entering, x * (active | entering))
            x, active = torch.where(wanted.unsqueeze(1), solved, x), torch.where(wanted.unsqueeze(1), kept, active)
            rejected = wanted & ~active.gather(1, slot.unsqueeze(1)).squeeze(1)
            futile.scatter_(1, feature.unsqueeze(1), futile.gather(1, feature.unsqueeze(1)) | rejected.unsqueeze(1))
            residual = problem.residual(features, x * active)
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
    Costs one correlation a step, of the new orthonormal direction (THEORY C.10). Arguments and errors as :func:`omp`.
    """
    check_tolerance(tol)
    return run(lambda problem: _ols(problem, tol), h, dictionary, k, b_dec)


def _ols(problem: Problem, tol: float | None) -> Solution:
    matrix, targets = problem.matrix, problem.targets
    active = ActiveSet(problem)
    floor, enough = problem.floor.unsqueeze(1), problem.target_norms(tol)
    residual = targets
    correlations = matrix.correlate(residual)
    distance = torch.ones_like(correlations)  # ‖P⊥ w_j‖²
    blocked = torch.zeros_like(correlations, dtype=torch.bool)
    rounds = torch.zeros_like(active.count)
    live = residual.norm(dim=1) > enough
    while bool(live.any()):
        dependent = distance <= pivot_floor(targets.dtype)
        weak = correlations.abs() <= floor
        gain = (correlations.square() / distance.clamp_min(pivot_floor(targets.dtype))).masked_fill(
            blocked | dependent | weak, -1.0
        )
        strength, feature = selection.best(gain, 1)
        live = live & (strength[:, 0] > 0)
        accepted = active.append(feature.squeeze(1), live)
        blocked.scatter_(1, feature, blocked.gather(1, feature) | live.unsqueeze(1))
        after = active.residual()
        # The residual moved along the new orthonormal direction, by construction.
        moved = residual - after
        length = moved.norm(dim=1, keepdim=True)
        turned = matrix.correlate(moved / length.clamp_min(torch.finfo(targets.dtype).tiny))
        distance = torch.where(accepted.unsqueeze(1), distance - turned.square(), distance)
        correlations = correlations - length * turned
        residual = after
        rounds += live
        live = live & (active.count < problem.k) & (residual.norm(dim=1) > enough)
    return Solution(active.features, active.refined(), active.used, rounds)
