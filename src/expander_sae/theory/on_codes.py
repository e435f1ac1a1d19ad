"""What the supports of actual codes are like: conditions that hold or fail token by token (docs/theory.md T13, T15).

``indices`` are int ``(B, k)``, distinct features; ``used``, bool ``(B, k)``, says which slots hold one (all, if it is
``None``). Columns are taken at unit norm whatever their norms are, in the coordinates of the basis if there is one. All
figures are float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from expander_sae.dictionary import Matrix
from expander_sae.ops import SparseCode

_CELLS = 1 << 24  # float64 entries of the largest array in use
_SINGULAR = 1e-12  # eigenvalues of a Gram matrix below this share of the largest are rounding error


@dataclass(frozen=True)
class Measures:
    """Figures of each code, ``(B,)``.

    Attributes:
        size: active features.
        erc: ``ρ(S) = max over j ∉ S of ‖W_S⁺ w_j‖₁``; below 1, OMP and basis pursuit find every code on ``S``.
        sigma_min: least singular value of ``W_S``.
        condition: largest over least singular value; ∞ for dependent columns.
        coverage: ``|N(S)|``; ``m`` at most. NaN for a dense dictionary.
        collisions: ``d·|S| - |N(S)|``. NaN likewise.
        coefficient_to_noise: ``min |x_j| / ‖e‖₂``, of coefficients of unit columns.
        needed: the ``coefficient_to_noise`` above which OMP's selections on ``S`` are right (docs/theory.md T15).
    """

    size: Tensor
    erc: Tensor
    sigma_min: Tensor
    condition: Tensor
    coverage: Tensor
    collisions: Tensor
    coefficient_to_noise: Tensor
    needed: Tensor


def erc(matrix: Matrix, indices: Tensor, used: Tensor | None = None) -> Tensor:
    """``ρ(S) = max over j ∉ S of ‖W_S⁺ w_j‖₁``, ``(B,)``: Tropp's exact recovery coefficient; ∞ for dependent columns.

    Costs ``n·k·d + n·k²`` per sample, in chunks of bounded memory.
    """
    unit, indices, used = _prepared(matrix, indices, used)
    out = torch.empty(len(indices), dtype=torch.float64)
    for part, columns, gram in _supports(unit, indices, used, unit.d_sae):
        on, slots = used[part], indices[part]
        eigenvalues = torch.linalg.eigvalsh(gram)
        dependent = eigenvalues[:, 0] <= _SINGULAR * eigenvalues[:, -1]
        gram[dependent] = torch.eye(gram.shape[1], dtype=gram.dtype)
        correlations = unit.correlate(columns)  # (b, k, n): W_Sᵀ W
        projected = (torch.linalg.inv(gram) @ correlations).abs_().sum(dim=1)
        # Members, and in unused slots some member again.
        member = torch.where(on, slots, slots.gather(1, on.int().argmax(dim=1, keepdim=True)))
        member = torch.where(on.any(dim=1, keepdim=True), member, 0)
        projected.scatter_(1, member, 0.0)
        out[part] = torch.where(dependent, torch.inf, projected.amax(dim=1))
    return out


def singular_values(matrix: Matrix, indices: Tensor, used: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Least and largest singular value of ``W_S``, ``(B,)`` each; dependent columns have 0, an empty ``S`` has 1, 1."""
    unit, indices, used = _prepared(matrix, indices, used)
    least, largest = (torch.empty(len(indices), dtype=torch.float64) for _ in range(2))
    for part, _, gram in _supports(unit, indices, used, unit.d_in):
        eigenvalues = torch.linalg.eigvalsh(gram)
        least[part], largest[part] = eigenvalues[:, 0], eigenvalues[:, -1]
    least[least <= _SINGULAR * largest] = 0.0
    return least.sqrt(), largest.sqrt()


def sigma_min(matrix: Matrix, indices: Tensor, used: Tensor | None = None) -> Tensor:
    """Least singular value of ``W_S``, ``(B,)``."""
    return singular_values(matrix, indices, used)[0]


def coverage(matrix: Matrix, indices: Tensor, used: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``|N(S)|`` and the collisions ``d·|S| - |N(S)|``, int64 ``(B,)`` each.

    Rows at which a column's entry is zero are not counted.

    Raises:
        ValueError: a dense dictionary, every column of which may use all rows.
    """
    if matrix.core.support is None:
        raise ValueError("coverage counts the rows of sparse columns: this dictionary is dense")
    unit, indices, used = _prepared(matrix, indices, used)
    covered, entries = (torch.empty(len(indices), dtype=torch.int64) for _ in range(2))
    for part, columns, _ in _supports(unit, indices, used, unit.d_in):
        nonzero = columns != 0
        covered[part] = nonzero.any(dim=1).sum(dim=1)
        entries[part] = nonzero.sum(dim=(1, 2))
    return covered, entries - covered


def measure(matrix: Matrix, code: SparseCode, noise: Tensor) -> Measures:
    """:class:`Measures` of codes ``(B, k)``.

    Args:
        matrix: the dictionary; coefficients are those of its columns as they are.
        code: a slot of value 0 is unused.
        noise: ``(B,)``, the norms ``‖e‖₂`` of what the codes leave.
    """
    used = code.values != 0
    size = used.sum(dim=1)
    least, largest = singular_values(matrix, code.indices, used)
    coefficient = erc(matrix, code.indices, used)
    nothing = torch.full_like(least, torch.nan)
    covered, collisions = (nothing, nothing) if matrix.core.support is None else coverage(matrix, code.indices, used)
    smallest = torch.where(used, unit_values(matrix, code).abs(), torch.inf).amin(dim=1)
    return Measures(
        size=size.cpu(),
        erc=coefficient,
        sigma_min=least,
        condition=largest / least,
        coverage=covered.double(),
        collisions=collisions.double(),
        coefficient_to_noise=smallest / noise.double().cpu(),
        needed=torch.where(coefficient < 1, 2 / (least.square() * (1 - coefficient)), torch.inf),
    )


def unit_values(matrix: Matrix, code: SparseCode) -> Tensor:
    """Coefficients of the unit columns, float64 ``(B, k)`` on the CPU."""
    norms = matrix.core.unit(torch.float64)[1].detach()
    return (code.values.detach().double() * norms[code.indices.long()]).cpu()


def _prepared(matrix: Matrix, indices: Tensor, used: Tensor | None) -> tuple[Matrix, Tensor, Tensor]:
    unit = matrix.core.detach().unit(torch.float64)[0]
    if indices.dim() != 2:
        raise ValueError(f"indices must have shape (B, k), got {tuple(indices.shape)}")
    indices = indices.long()
    used = torch.ones_like(indices, dtype=torch.bool) if used is None else used
    return unit, indices, used


def _supports(unit: Matrix, indices: Tensor, used: Tensor, width: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks: where, the columns ``(b, k, m)`` with zeros in unused slots, and their Gram matrix, 1 there.

    An array ``(b, k, width)`` fits into memory beside the columns.
    """
    count, k = indices.shape
    at_once = max(1, _CELLS // (k * max(width, unit.d_in)))
    for start in range(0, count, at_once):
        part = slice(start, min(count, start + at_once))
        columns = unit.columns(indices[part]) * used[part].unsqueeze(2)
        gram = columns @ columns.mT + torch.diag_embed((~used[part]).double())
        yield part, columns, gram
