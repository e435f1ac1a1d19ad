"""The plain training case in one pass: a tied TopK autoencoder under the mean squared error."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from expander_sae.ops import cpu, library
from expander_sae.ops.code import SparseCode
from expander_sae.ops.selection import Selection


class TiedError(NamedTuple):
    """What :func:`tied_error` returns. Gradients flow through ``error`` alone."""

    error: Tensor
    """``mean_b ‖h - ĥ‖²``, a scalar."""
    residual: Tensor
    """``h - ĥ``, ``(B, m)``, outside the graph."""
    code: SparseCode
    """The code, outside the graph."""


class _Fused(torch.autograd.Function):
    """The kernel finds all gradients on the way forward; the backward only scales them."""

    @staticmethod
    def forward(values: Tensor, b_enc: Tensor, b_dec: Tensor, h: Tensor, rows: Tensor, selection: Selection):
        step = cpu.train_step(h, rows, values, b_enc, b_dec, selection)
        gradients = step.grad_values, step.grad_b_enc, step.grad_b_dec
        return step.errors.mean(), step.residual, step.indices, step.code, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _error, *others = output
        ctx.save_for_backward(*others[3:])
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)  # or the backward would first fill a (B, m) array with zeros

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *(grad * saved for saved in ctx.saved_tensors), None, None, None


def tied_error(
    h: Tensor,
    rows: Tensor,
    values: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    selection: Selection,
    *,
    backend: str | None = None,
) -> TiedError:
    """``mean_b ‖h - Wx - b_dec‖²`` with ``x`` what ``selection`` takes of ``Wᵀ(h - b_dec) + b_enc``, and its gradients.

    ``h (B, m)`` is data: no gradient reaches it. On the C++ backend everything is one call that writes nothing of size
    ``(B, m)`` but the residual; elsewhere the operators of :mod:`expander_sae.ops.library` are composed.

    Raises:
        ValueError: shapes that do not fit, a capacity above ``n``, an empty batch.
    """
    h = h.detach()
    selection.check(rows.shape[0])
    scalar = not isinstance(selection.threshold, Tensor)  # the kernel knows one threshold
    if scalar and library.resolve_backend(backend, h.device) == "cpu":
        error, residual, indices, code, *_ = _Fused.apply(values, b_enc, b_dec, h, rows, selection)  # type: ignore[misc]
        return TiedError(error, residual, SparseCode(indices, code))
    chosen = backend or ""
    bias = selection.bias(b_enc)
    options = (selection.capacity, selection.magnitude, selection.floor, False, chosen)
    indices, margins = library.encode(h, rows, values, bias, b_dec, *options)
    code = selection.restore(indices, margins)
    residual = h - library.decode(indices, code, rows, values, h.shape[1], chosen) - b_dec
    return TiedError(residual.square().sum(dim=1).mean(), residual.detach(), SparseCode(indices, code.detach()))
