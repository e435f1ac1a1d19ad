"""The derivative of a least-squares code in the activations, its support held fixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expander_sae.dictionary import Matrix
from expander_sae.ops import SparseCode

_ORTHOGONAL = 1e-3  # a residual's largest correlation with its support, as a fraction of the sample's norm


class _OnSupport(torch.autograd.Function):
    """``x = (W_SᵀW_S)⁻¹ W_Sᵀ h``: the forward hands found coefficients through, the backward is the exact adjoint."""

    @staticmethod
    def forward(h: Tensor, indices: Tensor, values: Tensor, matrix: Matrix) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _h, indices, values, ctx.matrix = inputs
        ctx.save_for_backward(indices, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        indices, values = ctx.saved_tensors
        empty = values == 0
        gram = ctx.matrix.gram(indices).double()
        gram = torch.where(empty.unsqueeze(-1) | empty.unsqueeze(-2), 0.0, gram)
        gram.diagonal(dim1=-2, dim2=-1).add_(empty.double())
        grad = torch.where(empty, 0.0, grads[0]).double()
        factor, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed.any()):  # nearly dependent columns
            ridge = 1e-9 * gram.diagonal(dim1=-2, dim2=-1).amax(dim=-1)
            gram.diagonal(dim1=-2, dim2=-1).add_(ridge.unsqueeze(-1))
            factor = torch.linalg.cholesky(gram)
        solved = torch.cholesky_solve(grad.unsqueeze(-1), factor).squeeze(-1)
        back = ctx.matrix.decode(SparseCode(indices, solved.to(ctx.matrix.dtype)))
        return back, None, None, None


def least_squares_values(code: SparseCode, matrix: Matrix, h: Tensor, center: Tensor) -> Tensor:
    """The values of ``code``, as a differentiable function of ``h (..., m)`` on the code's fixed support.

    The support does not move for small changes of ``h`` (away from ties), so this is the derivative of the pursuit,
    provided its coefficients are the least-squares ones on their support.

    Raises:
        ValueError: they are not: the pursuit does not end in a least-squares fit.
    """
    flat = code.reshape(-1)
    with torch.no_grad():
        centred = (h.detach() - center).reshape(-1, matrix.d_in).to(matrix.dtype)
        residual = centred - matrix.decode(flat)
        left = torch.where(flat.values == 0, 0.0, matrix.correlate_at(residual, flat.indices)).abs()
        norms = centred.norm(dim=1, keepdim=True) * matrix.norms().max()
        if bool((left > _ORTHOGONAL * norms).any()):
            raise ValueError(
                "no gradient flows to the activations through this pursuit: its coefficients are not the least-squares "
                "ones on their support. Use one that ends in such a fit ('omp', 'matching-pursuit' with refit), "
                "'mp-unrolled', or detach the activations"
            )
    centred = (h - center).reshape(-1, matrix.d_in)
    values = _OnSupport.apply(centred.to(matrix.dtype), flat.indices, flat.values, matrix)
    return values.reshape(code.values.shape).to(code.values.dtype)  # type: ignore[union-attr]
