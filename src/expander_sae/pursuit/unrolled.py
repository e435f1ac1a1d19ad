"""Matching pursuit with gradients through it: MP-SAE's encoder (Costa et al. 2025, arXiv 2506.03093).

Each round takes the column that correlates best with the residual and peels it off::

    a_t = ⟨w_j, r_t⟩ / ‖w_j‖²,    r_{t+1} = r_t - a_t w_j

The choice ``j = j(t)`` has no gradient; the coefficients do, in the activations and in the columns. Autograd on the
loop keeps every residual and every ``(B, n)`` array of correlations. Here the forward keeps indices and coefficients
only, and the backward walks the recursion in reverse. With ``λ_t`` the gradient that arrives at ``r_t``, and the last
residual recomputed from the code::

    β_t = (ā_t - ⟨λ_{t+1}, w_j⟩) / ‖w_j‖²
    λ_t = λ_{t+1} + β_t w_j
    w̄_j += β_t r_{t+1} - a_t λ_t
    r_t = r_{t+1} + a_t w_j

so a round backwards costs ``O(B·d)`` on an expander, whatever ``n`` is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expander_sae.dictionary import Matrix
from expander_sae.ops import SparseCode
from expander_sae.pursuit.matching import matching_pursuit


def unrolled_matching_pursuit(
    matrix: Matrix, h: Tensor, k: int, *, nonnegative: bool = False, reselect: bool = False
) -> SparseCode:
    """The code of ``k`` rounds of matching pursuit, differentiable in ``h`` and in the columns.

    Args:
        matrix: an expander or dense matrix; columns need not have unit norm.
        h: ``(..., m)``.
        k: rounds.
        nonnegative: take positive correlations only.
        reselect: a feature may be taken again, as in the paper's plain pursuit; its coefficients are added in the slot
            of its first selection. Without, every round takes a new feature and the fast kernels do the forward.

    Returns:
        ``(..., k)``; a slot that no feature fills (nothing left to explain) has index 0 and value 0.

    Raises:
        ValueError: as :func:`expander_sae.pursuit.matching_pursuit`.
    """
    flat = h.reshape(-1, h.shape[-1])
    select = _repeating if reselect else _fresh
    indices, values = select(matrix.detach(), flat.detach(), k, nonnegative)
    values = _Coefficients.apply(flat, matrix.values, matrix.support, indices, values)
    code = SparseCode(indices, values)
    return (_merged(code) if reselect else code).reshape(*h.shape[:-1])


def _fresh(matrix: Matrix, h: Tensor, k: int, nonnegative: bool) -> tuple[Tensor, Tensor]:
    # Without a refit, non-negative is the same as signed selection, which the kernels have.
    code = matching_pursuit(h, matrix, k, refit=False, signed=nonnegative)
    return code.indices, code.values


def _repeating(matrix: Matrix, h: Tensor, k: int, nonnegative: bool) -> tuple[Tensor, Tensor]:
    norms = matrix.norms()
    scale = torch.where(norms > 0, 1 / norms, 0.0)
    residual = h
    floor = 32 * torch.finfo(h.dtype).eps * h.norm(dim=1, keepdim=True)
    indices, values = [], []
    for _ in range(k):
        correlation = matrix.correlate(residual) * scale
        feature = (correlation if nonnegative else correlation.abs()).argmax(dim=1, keepdim=True)
        found = correlation.gather(1, feature)
        enough = (found if nonnegative else found.abs()) > floor
        amount = torch.where(enough, found * scale[feature], 0.0)
        feature = torch.where(enough, feature, 0)
        residual = residual - amount * matrix.columns(feature.squeeze(1))
        indices.append(feature)
        values.append(amount)
    return torch.cat(indices, dim=1).to(torch.int32), torch.cat(values, dim=1)


def _merged(code: SparseCode) -> SparseCode:
    """A feature named several times gets the sum in its first slot, the other slots are emptied."""
    filled = code.values != 0
    same = (code.indices.unsqueeze(2) == code.indices.unsqueeze(1)) & filled.unsqueeze(1)
    first = torch.where(filled, same.to(torch.int8).argmax(dim=2), torch.arange(code.k, device=filled.device))
    values = torch.zeros_like(code.values).scatter_add(1, first, code.values)
    kept = first == torch.arange(code.k, device=filled.device)
    return SparseCode(torch.where(kept, code.indices, 0), values)


class _Coefficients(torch.autograd.Function):
    """Coefficients ``(B, k)`` found in the forward, with their gradient in ``h`` and ``columns``."""

    @staticmethod
    def forward(h: Tensor, columns: Tensor, rows: Tensor | None, indices: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = grad_outputs
        h, columns, rows, indices, values = ctx.saved_tensors
        residual, incoming = _Vectors(h.clone(), rows), _Vectors(torch.zeros_like(h), rows)
        squares = columns.square().sum(dim=1)
        grad_columns = torch.zeros_like(columns)
        for slot in range(indices.shape[1]):
            feature = indices[:, slot].long()
            residual.add(feature, -values[:, slot, None] * columns[feature])
        for slot in reversed(range(indices.shape[1])):
            feature, amount = indices[:, slot].long(), values[:, slot, None]
            column = columns[feature]
            after, arriving = residual.at(feature), incoming.at(feature)
            step = (grad[:, slot, None] - (arriving * column).sum(dim=1, keepdim=True)) / squares[feature, None]
            step = torch.where(amount != 0, step, 0.0)  # an empty slot depends on nothing
            moved = step * column
            grad_columns.index_add_(0, feature, step * after - amount * (arriving + moved))
            incoming.add(feature, moved)
            residual.add(feature, amount * column)
        return incoming.vectors, grad_columns, None, None, None


class _Vectors:
    """``(B, m)`` read and written on the support of one column a sample; ``rows`` is ``None`` for dense columns."""

    def __init__(self, vectors: Tensor, rows: Tensor | None) -> None:
        self.vectors, self.rows = vectors, rows

    def at(self, feature: Tensor) -> Tensor:
        return self.vectors.clone() if self.rows is None else self.vectors.gather(1, self.rows[feature].long())

    def add(self, feature: Tensor, change: Tensor) -> None:
        if self.rows is None:
            self.vectors += change
        else:
            self.vectors.scatter_add_(1, self.rows[feature].long(), change)
