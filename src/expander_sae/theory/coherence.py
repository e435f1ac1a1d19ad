"""Flatness and coherence of a dictionary, exact, and the levels they certify (docs/theory.md D4, D5, T8 to T12).

Columns are normalised here whatever their norms are, and taken in the coordinates of the basis, if there is one: an
orthogonal basis changes no inner product. Where all entries of a column have one size, inner products are
integers over ``d`` and stay so: on flat masks ``μ₁(3) + μ₁(4)`` may be exactly 1, which a float can take for less.
Elsewhere a strict inequality has to hold with a margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from expander_sae.dictionary import Matrix
from expander_sae.mask.structure import gram_blocks
from expander_sae.theory.rows import largest_partners

Number = Fraction | float
MARGIN = 1e-9
"""By so much a sum of floats has to stay below 1 to count as less. Their error is about 1e-15 per term."""

_DENSE_CELLS = 1 << 24  # entries of a block of a dense Gram matrix, and of dense columns


@dataclass(frozen=True)
class Coherence:
    """``μ₁`` of a dictionary with unit columns.

    Attributes:
        sums: ``μ₁(0), μ₁(1), …``; fractions where the columns are flat, floats elsewhere.
        d_sae: ``n``.
        zero_columns: columns without a nonzero entry. They are left out of the sums, and nothing is certified.
    """

    sums: tuple[Number, ...]
    d_sae: int
    zero_columns: int = 0

    @property
    def mu(self) -> Number:
        """``μ``: the largest inner product of two columns."""
        return self.at(1)

    @property
    def largest(self) -> int:
        """The largest size of which ``μ₁`` is known."""
        return self.d_sae if len(self.sums) >= self.d_sae else len(self.sums) - 1

    def at(self, size: int) -> Number:
        """``μ₁(size)``. With fewer other columns than that, it is the sum over all of them.

        Raises:
            ValueError: it was not computed.
        """
        if not 0 <= size <= self.largest:
            raise ValueError(f"μ₁({size}) was not computed, only up to μ₁({self.largest})")
        return self.sums[min(size, len(self.sums) - 1)]

    def recovery(self, k: int) -> Number:
        """``μ₁(k) + μ₁(k-1)``: below 1, OMP and basis pursuit find every ``k``-sparse code (docs/theory.md T10)."""
        return self.at(k) + self.at(k - 1)

    def recovers(self, k: int) -> bool:
        """Whether that is so; with a margin where it is a float."""
        return not self.zero_columns and below_one(self.recovery(k))

    def identifies(self, k: int) -> bool:
        """Whether every ``2k`` columns are independent, by Gershgorin: ``μ₁(2k-1) < 1``."""
        return not self.zero_columns and below_one(self.at(2 * k - 1))

    @property
    def omp_level(self) -> int:
        """The largest ``k`` with :meth:`recovers`, as far as ``μ₁`` is known."""
        return _level(self.recovers, self.largest)

    @property
    def unique_level(self) -> int:
        """The largest ``k`` with :meth:`identifies`, likewise."""
        return _level(self.identifies, (self.largest + 1) // 2)

    def coefficient_to_noise(self, k: int) -> float:
        """``min |x_j| / ‖e‖₂`` above which OMP's first ``k`` selections are right (docs/theory.md T12); maybe ∞."""
        return 2 / float(1 - self.recovery(k)) if self.recovers(k) else math.inf

    def stability(self, k: int) -> float:
        """``c`` in ``‖x - x'‖₂ ≤ c·(‖e‖₂ + η)`` for ``k``-sparse codes (docs/theory.md T11); maybe ∞."""
        return 1 / math.sqrt(1 - float(self.at(2 * k - 1))) if self.identifies(k) else math.inf


def below_one(value: Number) -> bool:
    """``value < 1``: exactly for a fraction, by :data:`MARGIN` for a float."""
    return value < 1 if isinstance(value, Fraction) else value < 1 - MARGIN


def coherence(matrix: Matrix, largest: int) -> Coherence:
    """``μ₁(0 … largest)`` of all columns, without an ``(n, n)`` array.

    Args:
        matrix: any; columns need not have unit norm.
        largest: at least 1; no more than ``n - 1`` are computed.
    """
    if largest < 1:
        raise ValueError(f"largest must be at least 1, got {largest}")
    partners = max(1, min(largest, matrix.d_sae - 1))
    support, entries = unit_entries(matrix)
    zero = int((entries == 0).all(dim=1).sum())
    if support is None:
        best = _dense_sums(entries, partners)
        return Coherence((0.0, *best), matrix.d_sae, zero)
    degree = support.shape[1]
    flat = zero == 0 and is_flat(entries)
    best = np.zeros(partners)
    for start, block in gram_blocks(support, entries.sign() if flat else entries, matrix.d_in):
        sums = largest_partners(block, start, partners, whole=flat).cumsum(axis=1)
        np.maximum(best, sums.max(axis=0), out=best)
    if flat:  # sums of products of signs: integers below 2⁵³
        return Coherence((Fraction(0), *(Fraction(int(total), degree) for total in best)), matrix.d_sae)
    return Coherence((0.0, *map(float, best)), matrix.d_sae, zero)


def flatness(matrix: Matrix) -> Tensor | None:
    """``β_j = √d·max |w_ij|`` of each column, float64 ``(n,)``; NaN for a zero column, ``None`` without supports."""
    support, entries = unit_entries(matrix)
    if support is None:
        return None
    peak = entries.abs().amax(dim=1)
    return torch.where(peak > 0, peak * math.sqrt(support.shape[1]), math.nan)


def squared_flatness(matrix: Matrix) -> Number | None:
    """``β²``, the largest of all columns; the fraction 1 where all are flat, ``None`` where there are no supports."""
    support, entries = unit_entries(matrix)
    if support is None:
        return None
    return Fraction(1) if is_flat(entries) else float(entries.square().max()) * support.shape[1]


def is_flat(entries: Tensor) -> bool:
    """Whether the entries ``(n, d)`` of each column differ in sign only (and none is zero)."""
    size = entries.abs()
    return bool((size == size[:, :1]).all()) and bool((size > 0).all())


def unit_entries(matrix: Matrix) -> tuple[Tensor | None, Tensor]:
    """Supports and unit-norm entries in float64 on the CPU: ``(n, d)`` each, or ``None`` and ``(n, m)`` dense."""
    matrix = matrix.core
    support = matrix.support
    support = None if support is None else support.cpu()
    n, m = matrix.d_sae, matrix.d_in
    out = torch.empty(n, m if support is None else support.shape[1], dtype=torch.float64)
    at_once = max(1, _DENSE_CELLS // m)
    for start in range(0, n, at_once):
        features = torch.arange(start, min(n, start + at_once), device=matrix.device)
        columns = matrix.columns(features).detach().double().cpu()
        part = slice(start, start + len(features))
        out[part] = columns if support is None else columns.gather(1, support[part].long())
    peak = out.abs().amax(dim=1, keepdim=True)
    out /= torch.where(peak > 0, peak, 1.0)  # first, so that squares neither overflow nor vanish
    norm = out.norm(dim=1, keepdim=True)
    return support, out / torch.where(norm > 0, norm, 1.0)


def _dense_sums(columns: Tensor, partners: int) -> list[float]:
    best = torch.zeros(partners, dtype=torch.float64)
    at_once = max(1, _DENSE_CELLS // columns.shape[0])
    for start in range(0, columns.shape[0], at_once):
        gram = (columns[start : start + at_once] @ columns.T).abs_()
        gram.diagonal(start).zero_()
        best = torch.maximum(best, gram.topk(partners, dim=1).values.cumsum(dim=1).amax(dim=0))
    return best.tolist()


def _level(holds: Callable[[int], bool], highest: int) -> int:
    k = 0
    while k < highest and holds(k + 1):
        k += 1
    return k
