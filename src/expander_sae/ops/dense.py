"""The same operations on a dense dictionary, at the best that stock PyTorch gives: the honest baseline.

``weight`` is ``(n, m)``, one feature a row. Selection is a matrix product and ``torch.topk``; everything after it
touches the ``k`` active features only, through ``embedding_bag``, whose forward is a fused gather and weighted sum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expander_sae.ops import arguments
from expander_sae.ops.code import SparseCode
from expander_sae.ops.reference import top_positions
from expander_sae.ops.selection import Selection

_SCORES_AT_ONCE = 1 << 25  # scores made in one go: 128 MiB of them


def _embed_sum(indices: Tensor, code_values: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(indices, weight, per_sample_weights=code_values.to(weight.dtype), mode="sum")


def _correlate_at(h: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    # <weight[index], h> is the derivative of <embed_sum, h> in the code: PyTorch has that as a fused kernel, where
    # weight[indices] @ h would build a (B, k, m) array.
    batch, k = indices.shape
    flat = indices.reshape(-1)
    offsets = torch.arange(0, batch * k, k, device=indices.device, dtype=indices.dtype)
    bags = torch.arange(batch, device=indices.device, dtype=indices.dtype).repeat_interleave(k)
    found = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        h.to(weight.dtype).contiguous(), weight, flat, offsets, bags, 0
    )
    return found.view(batch, k)


def _weight_grad(h: Tensor, indices: Tensor, coef: Tensor, n: int) -> Tensor:
    """``(n, m)``: ``out[j] = Σ coef[b, s] · h[b]`` over ``indices[b, s] = j``: a bag of samples for every feature."""
    features, order = indices.flatten().sort(stable=True)
    samples = torch.div(order, indices.shape[1], rounding_mode="floor")
    offsets = torch.searchsorted(features, torch.arange(n, device=h.device, dtype=features.dtype))
    return F.embedding_bag(samples, h, offsets, per_sample_weights=coef.flatten()[order].to(h.dtype), mode="sum")


def _best(
    h: Tensor, weight: Tensor, b_enc: Tensor | None, k: int, magnitude: bool, threshold: float
) -> tuple[Tensor, Tensor]:
    z = F.linear(h, weight, b_enc)
    position = top_positions(z.abs() if magnitude else z, k)
    chosen = z.gather(1, position)
    if threshold > -math.inf:
        empty = (chosen.abs() if magnitude else chosen) <= threshold
        position, chosen = position.masked_fill(empty, 0), chosen.masked_fill(empty, 0.0)
    return position.to(torch.int32), chosen


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        h: Tensor, weight: Tensor, b_enc: Tensor | None, k: int, magnitude: bool, threshold: float
    ) -> tuple[Tensor, Tensor]:
        split = h.split(max(1, _SCORES_AT_ONCE // weight.shape[0]))
        parts = [_best(part, weight, b_enc, k, magnitude, threshold) for part in split]
        indices, chosen = parts[0] if len(parts) == 1 else (torch.cat(found) for found in zip(*parts, strict=True))
        return indices, chosen

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        h, weight, _b_enc, _k, _magnitude, threshold = inputs
        indices, chosen = output
        ctx.save_for_backward(h, weight, indices, chosen)
        ctx.thresholded = threshold > -math.inf
        ctx.mark_non_differentiable(indices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _grad_indices: Tensor, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        h, weight, indices, chosen = ctx.saved_tensors
        if ctx.thresholded:
            grad = grad * (chosen != 0)  # an empty slot depends on nothing
        grad_h = _embed_sum(indices, grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_grad(h, indices, grad, weight.shape[0]) if ctx.needs_input_grad[1] else None
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad.new_zeros(weight.shape[0]).index_add_(0, indices.flatten(), grad.flatten())
        return grad_h, grad_weight, grad_bias, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(indices: Tensor, code_values: Tensor, weight: Tensor) -> Tensor:
        return _embed_sum(indices, code_values, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        indices, code_values, weight = ctx.saved_tensors
        grad_code = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_code = _correlate_at(grad, indices, weight).to(code_values.dtype)
        if ctx.needs_input_grad[2]:
            grad_weight = _weight_grad(grad, indices, code_values, weight.shape[0])
        return None, grad_code, grad_weight


class _CorrelateAt(torch.autograd.Function):
    @staticmethod
    def forward(h: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        return _correlate_at(h, indices, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        h, indices, weight = ctx.saved_tensors
        grad_h = _embed_sum(indices, grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_grad(h, indices, grad, weight.shape[0]) if ctx.needs_input_grad[2] else None
        return grad_h, None, grad_weight


def encode(
    h: Tensor,
    weight: Tensor,
    b_enc: Tensor | None,
    selection: Selection,
    *,
    center: Tensor | None = None,
    check_finite: bool = False,
) -> SparseCode:
    """What ``selection`` takes of ``(h - center) Wᵀ + b_enc``, ``h (B, m)``: slots ``(B, capacity)``.

    The scores are made for a bounded number of samples at a time.

    Raises:
        ValueError: a capacity above ``n``; with ``check_finite``, NaN or infinity in ``h``.
    """
    n, m = weight.shape
    selection.check(n)
    arguments.bias("b_enc", b_enc, n)
    arguments.bias("center", center, m)
    if check_finite and not torch.compiler.is_compiling():
        arguments.finite(h)
    centred = h if center is None else h - center.to(h.dtype)
    bias = selection.bias(b_enc)
    indices, margins = _Encode.apply(centred, weight, bias, selection.capacity, selection.magnitude, selection.floor)  # type: ignore[misc]
    return SparseCode(indices, selection.restore(indices, margins))


def decode(indices: Tensor, code_values: Tensor, weight: Tensor) -> Tensor:
    """``Σ_s code_values[b, s] · weight[indices[b, s]]``: ``(B, m)``."""
    return _Decode.apply(indices, code_values, weight)  # type: ignore[return-value]


def correlate_at(h: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """``⟨weight[indices[b, s]], h[b]⟩``: ``(B, k)``."""
    return _CorrelateAt.apply(h, indices, weight)  # type: ignore[return-value]
