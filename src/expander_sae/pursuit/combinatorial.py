"""Combinatorial decoders of expander codes: recover an exactly sparse code by counting equal residual entries.

Made for compressed sensing (docs/theory.md S9), generalised from binary to weighted masks: where the rows
of column ``j`` see no other active column, the ratios ``r_i / w_ij`` agree, and their common value is the coefficient.
Activations are not exactly sparse in any dictionary, so nearly no two ratios agree there: **these are no encoders** for
an SAE; use :func:`~expander_sae.pursuit.omp.omp`. They want *dissociated* coefficients: no two subsets of equal sum.

All need an expander dictionary. Equality is within ``agreement`` times the sample's largest entry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expander_sae.dictionary import Dictionary, Matrix
from expander_sae.pursuit import selection
from expander_sae.pursuit.code import PursuitCode
from expander_sae.pursuit.problem import Problem, Solution, as_matrix, run, supports


def parallel_l0(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    alpha: int | None = None,
    steps: int | None = None,
    agreement: float | None = None,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """Parallel-ℓ0 (Mendoza-Smith & Tanner 2015, arXiv 1508.01256).

    Pass ``i`` proposes for every column the coefficient that its ``i mod d``-th row suggests, and applies all proposals
    that make at least ``alpha`` residual entries zero. On an ``(2k, ε, d)``-expander with ``ε ≤ 1/4`` and
    ``alpha = (1 - 2ε) d`` it recovers every dissociated ``k``-sparse code in ``O(d n log k)`` operations.

    Args:
        alpha: zeros a proposal must gain, ``1 ... d``; default ``⌈d / 2⌉``.
        steps: the most passes; default ``8 d + 2 k``.
        agreement: entries closer than this times the sample's largest are equal; default the root of the type's
            epsilon.
        h, dictionary, k, b_dec: as :func:`~expander_sae.pursuit.omp.omp`.

    Returns:
        The code, largest coefficient first; ``iterations`` counts passes. ``residual_norms`` tells whether it worked.

    Raises:
        ValueError: a dense dictionary, or ``alpha`` out of range.
    """
    matrix = expander_only(dictionary)
    gain = _gain(alpha, matrix)

    def solve(problem: Problem) -> Solution:
        return _parallel(problem, gain, steps or 8 * supports(matrix).shape[1] + 2 * k, _tolerance(problem, agreement))

    return run(solve, h, matrix, k, b_dec, cells=memory_cells)


def serial_l0(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    alpha: int | None = None,
    sweeps: int | None = None,
    agreement: float | None = None,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """Serial-ℓ0 (Mendoza-Smith & Tanner 2015): sweep through the columns, each applying its best proposal at once.

    Columns are visited in classes that share no row, which changes the order of the sweep and nothing else. A column
    tries the most frequent ratio of its rows. Arguments as :func:`parallel_l0`; ``sweeps`` defaults to ``k + 1``.
    """
    matrix = expander_only(dictionary)
    gain = _gain(alpha, matrix)
    classes = _disjoint_classes(matrix)

    def solve(problem: Problem) -> Solution:
        return _serial(problem, gain, sweeps or k + 1, _tolerance(problem, agreement), classes)

    return run(solve, h, matrix, k, b_dec, cells=memory_cells)


def expander_recovery(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    epsilon: float = 0.25,
    agreement: float | None = None,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """Expander recovery (Jafarpour, Xu, Hassibi & Calderbank 2009): ``2k`` times take a column with equal ratios.

    A column needs ``⌈(1 - 2 epsilon) d⌉`` equal nonzero ratios; of several the one with most is taken, ties to the
    lower index. ``iterations`` counts the columns taken. Other arguments as :func:`parallel_l0`.
    """
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"epsilon must be in [0, 0.5), got {epsilon}")
    matrix = expander_only(dictionary)
    needed = max(2, math.ceil((1 - 2 * epsilon) * supports(matrix).shape[1]))
    return _run_one_by_one(h, matrix, k, needed, agreement, b_dec)


def lddsr(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    agreement: float | None = None,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """The decoder of Xu & Hassibi (2007): as :func:`expander_recovery`; a column needs over ``d / 2`` equal ratios."""
    matrix = expander_only(dictionary)
    needed = max(2, supports(matrix).shape[1] // 2 + 1)
    return _run_one_by_one(h, matrix, k, needed, agreement, b_dec)


def expander_only(dictionary: Matrix | Dictionary) -> Matrix:
    """The matrix, or :class:`ValueError` if its columns are dense."""
    matrix = as_matrix(dictionary)
    supports(matrix)
    return matrix


def _gain(alpha: int | None, matrix: Matrix) -> int:
    degree = supports(matrix).shape[1]
    gain = -(-degree // 2) if alpha is None else alpha
    if not 1 <= gain <= degree:
        raise ValueError(f"alpha must be between 1 and the degree {degree}, got {alpha}")
    return gain


def memory_cells(matrix: Matrix) -> int:
    """Floats a sample needs."""
    return 6 * matrix.values.numel() + 8 * matrix.d_sae


def _tolerance(problem: Problem, agreement: float | None) -> float:
    # Samples are scaled to a largest entry between 1/2 and 1.
    return torch.finfo(problem.targets.dtype).eps ** 0.5 if agreement is None else agreement


def neighbours(matrix: Matrix, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Residual entries ``r_i`` and ratios ``r_i / w_ij`` of every column, ``(B, n, d)``; a zero weight gives NaN."""
    entries = residual[:, supports(matrix).long()]
    return entries, entries / torch.where(matrix.values == 0, torch.nan, matrix.values)


def _zeros_gained(entries: Tensor, proposal: Tensor, weights: Tensor, tolerance: float) -> Tensor:
    """``‖r‖₀ - ‖r - v w_j‖₀`` for proposals ``v``; every argument broadcasts to ``(..., d)``."""
    after = (entries - proposal.unsqueeze(-1) * weights).abs() <= tolerance
    return after.sum(dim=-1) - (entries.abs() <= tolerance).sum(dim=-1)


def _most_agreeing(entries: Tensor, ratios: Tensor, weights: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """How many of a column's nonzero entries agree at best on one ratio, and that ratio."""
    nonzero = entries.abs() > tolerance  # zeros would agree with every proposal that is small enough
    best = torch.zeros(entries.shape[:-1], dtype=torch.int64, device=entries.device)
    value = torch.zeros_like(entries[..., 0])
    for place in range(entries.shape[-1]):
        proposal = ratios[..., place]
        agree = (((entries - proposal.unsqueeze(-1) * weights).abs() <= tolerance) & nonzero).sum(dim=-1)
        agree = torch.where(nonzero[..., place], agree, 0)
        better = agree > best
        best, value = torch.where(better, agree, best), torch.where(better, proposal, value)
    return best, value


def finish(problem: Problem, x: Tensor, rounds: Tensor) -> Solution:
    """The ``k`` largest entries of the dense codes ``x (B, n)``."""
    strength, features = selection.best(x.abs(), problem.k)
    return Solution(features, x.gather(1, features), strength > 0, rounds)


def _parallel(problem: Problem, gain: int, steps: int, tolerance: float) -> Solution:
    matrix, targets = problem.matrix, problem.targets
    combine, degree = matrix.synthesis(), supports(matrix).shape[1]
    x = targets.new_zeros(problem.batch, matrix.d_sae)
    best_x, residual = x, targets
    fewest = (targets.abs() > tolerance).sum(dim=1)
    rounds = torch.zeros_like(fewest)
    quiet = torch.zeros_like(fewest)
    live = fewest > 0
    for step in range(steps):
        if not bool(live.any()):
            break
        entries, ratios = neighbours(matrix, residual)
        proposal = ratios[..., step % degree].nan_to_num()
        accepted = _zeros_gained(entries, proposal, matrix.values, tolerance) >= gain
        accepted &= (entries[..., step % degree].abs() > tolerance) & live.unsqueeze(1)
        x = x + torch.where(accepted, proposal, 0.0)
        # Entries that cancelled to within the tolerance are zero: their rounding error must not be built upon.
        residual = targets - combine(x)
        nonzeros = (residual.abs() > tolerance).sum(dim=1)
        improved = live & (nonzeros < fewest)
        best_x = torch.where(improved.unsqueeze(1), x, best_x)
        fewest = torch.where(improved, nonzeros, fewest)
        rounds += live
        quiet = torch.where(improved, 0, quiet + 1)
        live = live & (nonzeros > 0) & (quiet < 2 * degree)
    return finish(problem, best_x, rounds)


def _disjoint_classes(matrix: Matrix) -> list[Tensor]:
    """Columns in classes that share no row, first fit: updating a class at once has the effect of one by one."""
    rows = supports(matrix).long().cpu()
    taken: list[Tensor] = []
    members: list[list[int]] = []
    table = torch.zeros(0, matrix.d_in, dtype=torch.bool)
    for column in range(rows.shape[0]):
        free = (~table[:, rows[column]].any(dim=1)).nonzero()
        place = int(free[0]) if free.numel() else len(taken)
        if place == len(taken):
            taken.append(rows[column])
            members.append([])
            table = torch.cat([table, torch.zeros(1, matrix.d_in, dtype=torch.bool)])
        members[place].append(column)
        table[place, rows[column]] = True
    return [torch.tensor(columns, device=matrix.device) for columns in members]


def _serial(problem: Problem, gain: int, sweeps: int, tolerance: float, classes: list[Tensor]) -> Solution:
    matrix, targets = problem.matrix, problem.targets
    rows = supports(matrix).long()
    x = targets.new_zeros(problem.batch, matrix.d_sae)
    residual = targets.clone()
    rounds = torch.zeros(problem.batch, dtype=torch.int64, device=targets.device)
    live = (residual.abs() > tolerance).any(dim=1)
    for _ in range(sweeps):
        if not bool(live.any()):
            break
        rounds += live
        moved = torch.zeros_like(live)
        for columns in classes:
            weights, at = matrix.values[columns], rows[columns]
            entries = residual[:, at]
            ratios = entries / torch.where(weights == 0, torch.nan, weights)
            _, proposal = _most_agreeing(entries, ratios, weights, tolerance)
            accepted = _zeros_gained(entries, proposal, weights, tolerance) >= gain
            accepted &= (proposal != 0) & live.unsqueeze(1)
            amount = torch.where(accepted, proposal, 0.0)
            x[:, columns] += amount
            residual[:, at.flatten()] -= (amount.unsqueeze(-1) * weights).flatten(1)
            moved |= accepted.any(dim=1)
        live = live & moved & (residual.abs() > tolerance).any(dim=1)
    return finish(problem, x, rounds)


def _run_one_by_one(
    h: Tensor, matrix: Matrix, k: int, needed: int, agreement: float | None, b_dec: Tensor | None
) -> PursuitCode:
    def solve(problem: Problem) -> Solution:
        return _one_by_one(problem, needed, _tolerance(problem, agreement))

    return run(solve, h, matrix, k, b_dec, cells=memory_cells)


def _one_by_one(problem: Problem, needed: int, tolerance: float) -> Solution:
    matrix, targets = problem.matrix, problem.targets
    x = targets.new_zeros(problem.batch, matrix.d_sae)
    residual = targets
    rounds = torch.zeros(problem.batch, dtype=torch.int64, device=targets.device)
    live = (residual.abs() > tolerance).any(dim=1)
    for _ in range(2 * problem.k):
        entries, ratios = neighbours(matrix, residual)
        agree, proposal = _most_agreeing(entries, ratios, matrix.values, tolerance)
        column = agree.argmax(dim=1, keepdim=True)
        live = live & (agree.gather(1, column).squeeze(1) >= needed)
        if not bool(live.any()):
            break
        amount = torch.where(live.unsqueeze(1), proposal.gather(1, column), 0.0)
        x.scatter_add_(1, column, amount)
        residual = residual - amount * matrix.columns(column.squeeze(1))
        rounds += live
        live = live & (residual.abs() > tolerance).any(dim=1)
    return finish(problem, x, rounds)
