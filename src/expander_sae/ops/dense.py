"""The same operations on a dense dictionary, at the best that stock PyTorch gives: the honest baseline.

``weight`` is ``(n, m)``, one feature a row. Selection is a matrix product and ``torch.topk``; everything after it
touches the ``k`` active features only, through ``embedding_bag``, whose forward is a fused gather and weighted sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expander_sae.ops.reference import top_positions


def _embed_sum(indices: Tensor, code_values: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(indices, weight, per_sample_weights=code_values.to(weight.dtype), mode="sum")


def _correlate_at(h: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    # <weight[index], h> is the derivative of <embed_sum, h> in the code: PyTorch has that as a fused kernel, where
    # weight[indices] @ h would build a (B, k, m) array.
    probe = torch.zeros(indices.shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
    with torch.enable_grad():
        total = _embed_sum(indices, probe, weight.detach())
    return torch.autograd.grad(total, probe, h.to(weight.dtype))[0]


def _weight_grad(h: Tensor, indices: Tensor, coef: Tensor, n: int) -> Tensor:
    """``(n, m)``: ``out[j] = Σ coef[b, s] · h[b]`` over ``indices[b, s] = j``: a bag of samples for every feature."""
    features, order = indices.flatten().sort(stable=True)
    samples = torch.div(order, indices.shape[1], rounding_mode="floor")
    offsets = torch.searchsorted(features, torch.arange(n, device=h.device, dtype=features.dtype))
    return F.embedding_bag(samples, h, offsets, per_sample_weights=coef.flatten()[order].to(h.dtype), mode="sum")


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, b_enc: Tensor | None, k: int, relu: bool, magnitude: bool
    ) -> tuple[Tensor, Tensor]:
        z = F.linear(h, weight, b_enc)
        position = top_positions(z.abs() if magnitude else z, k)
        chosen = z.gather(1, position)
        chosen = chosen.clamp_min(0) if relu else chosen
        indices = position.to(torch.int32)
        ctx.save_for_backward(h, weight, indices, chosen)
        ctx.relu = relu
        ctx.mark_non_differentiable(indices)
        return indices, chosen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _grad_indices: Tensor, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        h, weight, indices, chosen = ctx.saved_tensors
        if ctx.relu:
            grad = grad * (chosen > 0)
        grad_h = _embed_sum(indices, grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_grad(h, indices, grad, weight.shape[0]) if ctx.needs_input_grad[1] else None
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad.new_zeros(weight.shape[0]).index_add_(0, indices.flatten(), grad.flatten())
        return grad_h, grad_weight, grad_bias, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, code_values: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(indices, code_values, weight)
        return _embed_sum(indices, code_values, weight)

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
    def forward(ctx: Any, h: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(h, indices, weight)
        return _correlate_at(h, indices, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        h, indices, weight = ctx.saved_tensors
        grad_h = _embed_sum(indices, grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_grad(h, indices, grad, weight.shape[0]) if ctx.needs_input_grad[2] else None
        return grad_h, None, grad_weight


def encode_topk(
    h: Tensor, weight: Tensor, b_enc: Tensor | None, k: int, relu: bool = False, magnitude: bool = False
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest entries of ``h Wᵀ + b_enc``; ``h (B, m)``; indices int32 and values ``(B, k)``."""
    return _Encode.apply(h, weight, b_enc, k, relu, magnitude)  # type: ignore[return-value]


def decode(indices: Tensor, code_values: Tensor, weight: Tensor) -> Tensor:
    """``Σ_s code_values[b, s] · weight[indices[b, s]]``: ``(B, m)``."""
    return _Decode.apply(indices, code_values, weight)  # type: ignore[return-value]


def correlate_at(h: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """``⟨weight[indices[b, s]], h[b]⟩``: ``(B, k)``."""
    return _CorrelateAt.apply(h, indices, weight)  # type: ignore[return-value]
