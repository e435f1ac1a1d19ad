"""Least squares on a support: grown column by column, at once, or under ``x ≥ 0``.

Columns have unit norm. A column that depends on those before it (its squared distance to their span is below
:func:`pivot_floor`) is left out: its coefficient is 0, nothing turns into NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expander_sae.dictionary import Dictionary, Matrix
from expander_sae.pursuit.code import PursuitCode
from expander_sae.pursuit.problem import Problem, Solution, run


def pivot_floor(dtype: torch.dtype) -> float:
    """Squared distance to the span of the others below which a unit column counts as dependent."""
    return 16 * torch.finfo(dtype).eps


class ActiveSet:
    """Supports that grow column by column, with their least-squares coefficients (docs/theory.md S2).

    Kept is the *inverse* ``L⁻¹`` of the Cholesky factor of each Gram matrix: row ``s`` holds the coefficients of an
    orthonormal direction ``q_s``, so a column costs two products with it and the coefficients grow by ``⟨q_s, h⟩``
    times its row; nothing is solved. Each sample has its own count. Unused slots are zero everywhere, which keeps
    them out of every product.
    """

    def __init__(self, problem: Problem) -> None:
        size, targets = problem.k, problem.targets
        self.problem = problem
        self.features = torch.zeros(problem.batch, size, dtype=torch.int64, device=targets.device)
        self.count = torch.zeros(problem.batch, dtype=torch.int64, device=targets.device)
        self.values = targets.new_zeros(problem.batch, size)
        self._inverse = targets.new_zeros(problem.batch, size, size)
        self._along = targets.new_zeros(problem.batch, size)  # ⟨q_s, targets⟩
        self.width = 0  # no sample uses more slots; known without asking the device
        self.direction = self._inverse[:, 0, :0]  # the newest q as coefficients of the columns, (B, width); 0: none
        self.amount = self._along[:, :1]  # ⟨q, targets⟩, (B, 1)

    @property
    def used(self) -> Tensor:
        """bool ``(B, k)``."""
        return torch.arange(self.features.shape[1], device=self.count.device) < self.count.unsqueeze(1)

    def append(self, feature: Tensor, wanted: Tensor) -> None:
        """Add ``feature (B,)`` where ``wanted (B,)``, there is room and it is independent of the support."""
        feature = feature.unsqueeze(1)
        inverse, along = self._inverse[:, : self.width, : self.width], self._along[:, : self.width]
        known = self.problem.products(feature, self.features[:, : self.width])
        across = _times(known, inverse.mT)  # ⟨q_s, w⟩
        pivot = 1 - across.square().sum(dim=1, keepdim=True)
        floor = pivot_floor(pivot.dtype)
        capacity = self.features.shape[1]
        accepted = wanted.unsqueeze(1) & (pivot > floor) & (self.count < capacity).unsqueeze(1)
        scale = accepted * pivot.clamp_min(floor).rsqrt()
        amount = scale * (self.problem.correlations.gather(1, feature) - (across * along).sum(dim=1, keepdim=True))
        # Whatever is added below is 0 where the feature was not accepted, and lands on a slot that was 0 elsewhere.
        slot = self.count.clamp_max(capacity - 1).unsqueeze(1)
        self.width = min(self.width + 1, capacity)
        row = scale.new_zeros(scale.shape[0], self.width)
        row[:, : along.shape[1]] = _times(across, inverse) * -scale
        row.scatter_add_(1, slot, scale)
        self.features.scatter_add_(1, slot, feature * accepted)
        self.values[:, : self.width] += amount * row
        self._inverse.scatter_add_(1, slot.unsqueeze(2).expand(-1, 1, self.width), row.unsqueeze(1))
        self._along.scatter_add_(1, slot, amount)
        self.count = self.count + accepted.squeeze(1)
        self.direction, self.amount = row, amount

    def refined(self) -> Tensor:
        """``values`` with one step of iterative refinement: the normal equations square the condition number."""
        gradient = self.problem.matrix.correlate_at(self.residual(), self.features.to(torch.int32))
        return self.values + _times(_times(gradient, self._inverse.mT), self._inverse)

    def residual(self) -> Tensor:
        """``targets - W_S x``, ``(B, m)``."""
        return self.problem.residual(self.features[:, : self.width], self.values[:, : self.width])

    def correlations(self, residual: Tensor) -> Tensor:
        """``Wᵀ`` times the :meth:`residual`, ``(B, n)``, for the caller to write to."""
        return self.problem.correlate(self.features[:, : self.width], self.values[:, : self.width], residual)


def _times(row: Tensor, matrix: Tensor) -> Tensor:
    """``row (B, p)`` times ``matrix (B, p, q)``; a column on the right instead would be many times slower on a CPU."""
    return torch.bmm(row.unsqueeze(1), matrix).squeeze(1)


def guarded_cholesky(gram: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of ``gram (B, p, p)`` restricted to the slots ``wanted (B, p)`` that are independent.

    Returns:
        the lower factor ``(B, p, p)``, the identity on slots left out, and the slots taken, bool ``(B, p)``.
    """
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    pair = wanted.unsqueeze(1) & wanted.unsqueeze(2)
    factor, failed = torch.linalg.cholesky_ex(torch.where(pair, gram, eye))
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    bad = (failed != 0) | ~(pivots > pivot_floor(gram.dtype)).all(dim=1)
    taken = wanted.clone()
    if bool(bad.any()):
        factor[bad], taken[bad] = _skipping_cholesky(gram[bad], wanted[bad])
    return factor, taken


def _skipping_cholesky(gram: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Column by column; a slot whose pivot vanishes becomes a slot of the identity."""
    size = gram.shape[1]
    factor = torch.zeros_like(gram)
    taken = wanted.clone()
    for slot in range(size):
        below = gram[:, slot:, slot] - (factor[:, slot:, :slot] @ factor[:, slot, :slot, None]).squeeze(2)
        taken[:, slot] &= below[:, 0] > pivot_floor(gram.dtype)
        keep = taken[:, slot, None]
        root = torch.where(keep, below[:, :1], 1.0).sqrt()
        factor[:, slot:, slot] = torch.where(keep, below / root, 0.0)
        factor[:, slot, :slot] *= keep
        factor[:, slot, slot] = root.squeeze(1)
    return factor, taken


def support_gram(matrix: Matrix, features: Tensor) -> Tensor:
    """``(B, p, p)``, through the dense columns: bounded memory on every kind of matrix and device."""
    columns = matrix.columns(features)
    return columns @ columns.mT


def solve_support(problem: Problem, features: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares on ``features (B, p)`` where ``used``; one refinement step.

    Returns:
        coefficients ``(B, p)``, 0 in slots unused, repeated or dependent on earlier ones; and the slots taken.
    """
    factor, taken = guarded_cholesky(support_gram(problem.matrix, features), used)
    indices = features.to(torch.int32)
    x = torch.zeros_like(factor[:, 0])
    residual = problem.targets
    for _ in range(2):
        gradient = problem.matrix.correlate_at(residual, indices) * taken
        x = x + torch.cholesky_solve(gradient.unsqueeze(2), factor).squeeze(2)
        residual = problem.residual(features, x)
    return x, taken


def nonnegative_step(gram: Tensor, right: Tensor, active: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The inner loop of Lawson & Hanson (1974, ch. 23): least squares, dropping the slots that leave ``x ≥ 0``.

    Args:
        gram: ``(B, p, p)``; right: ``(B, p)``, ``Wᵀh``; active: bool ``(B, p)``; x: ``(B, p)``, feasible.

    Returns:
        coefficients, positive on the active slots and 0 elsewhere, and the active slots.
    """
    active = active.clone()
    for _ in range(gram.shape[1]):  # every pass drops a slot where it does not settle
        factor, taken = guarded_cholesky(gram, active)
        full = torch.cholesky_solve((right * taken).unsqueeze(2), factor).squeeze(2) * taken
        leaving = active & (full <= 0)
        ratio = torch.where(leaving, x / (x - full).clamp_min(torch.finfo(x.dtype).tiny), 1.0)
        step = ratio.amin(dim=1, keepdim=True)
        moved = x + step * (full - x)
        dropped = leaving & (ratio <= step)
        settled = ~leaving.any(dim=1, keepdim=True)
        active = active & ~dropped
        x = torch.where(settled, full, moved) * active
        if bool(settled.all()):
            break
    return x.clamp_min(0), active


def nonnegative_support(problem: Problem, features: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Non-negative least squares on ``features (B, p)`` where ``used`` (Lawson & Hanson 1974).

    Returns:
        coefficients ``(B, p)`` and the slots where they are positive.
    """
    gram = support_gram(problem.matrix, features)
    right = problem.matrix.correlate_at(problem.targets, features.to(torch.int32)) * used
    floor = problem.floor.unsqueeze(1)
    x = torch.zeros_like(right)
    active = torch.zeros_like(used)
    open_slots = used.clone()
    for _ in range(3 * features.shape[1]):
        slope = right - (gram @ x.unsqueeze(2)).squeeze(2)
        slope = torch.where(open_slots & ~active & (slope > floor), slope, -torch.inf)
        best, slot = slope.max(dim=1)
        entering = torch.zeros_like(active).scatter(1, slot.unsqueeze(1), (best > 0).unsqueeze(1))
        if not bool(entering.any()):
            break
        x, active = nonnegative_step(gram, right, active | entering, x)
        open_slots &= ~(entering & ~active)  # rounding alone made it look useful: do not try it again
    return x, active


def refit(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    indices: Tensor,
    *,
    nonnegative: bool = False,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """Inference-time optimisation on a given support: the least-squares coefficients of ``h - b_dec``.

    Args:
        h: ``(..., m)``.
        dictionary: a dictionary or its matrix.
        indices: integer ``(..., k)``, the support, for example an encoder's. Of columns that depend on earlier ones
            (a repeated feature is one) the later get coefficient 0.
        nonnegative: solve under ``x ≥ 0``.
        b_dec: ``(m,)``, subtracted from ``h`` first.

    Returns:
        The code in the order of ``indices`` (features left out are moved behind); ``iterations`` is 1.

    Raises:
        ValueError: shapes that do not fit, or features outside ``[0, d_sae)``.
    """
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    if indices.dim() != h.dim() or indices.shape[:-1] != h.shape[:-1]:
        raise ValueError(
            f"indices {tuple(indices.shape)} do not fit activations {tuple(h.shape)}: expected (..., k) and (..., m)"
        )
    n = dictionary.d_sae
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= n):
        raise ValueError(f"indices must lie in [0, {n}), got [{int(indices.min())}, {int(indices.max())}]")
    supports = indices.reshape(-1, indices.shape[-1]).long()

    def solve(problem: Problem) -> Solution:
        features = supports[problem.first : problem.first + problem.batch]
        everything = torch.ones_like(features, dtype=torch.bool)
        x, taken = (nonnegative_support if nonnegative else solve_support)(problem, features, everything)
        return Solution(features, x, taken, torch.ones_like(features[:, 0]))

    k = indices.shape[-1]
    return run(solve, h, dictionary, k, b_dec, cells=lambda matrix: 2 * k * matrix.d_in + 4 * k * k)
