"""The hot operations as ``torch.library`` operators: dispatch to a backend, fake-tensor rules, autograd.

``torch.ops.expander_sae.<name>`` works on flat ``(B, ...)`` tensors; :mod:`expander_sae.ops` is the public surface.
Gradients flow over active features only, through the same operators, so they can be taken twice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expander_sae.ops import cpu, reference, triton

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

BACKEND_VARIABLE = "EXPANDER_SAE_BACKEND"
_BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "triton": triton}


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """The backend that runs: the argument, else ``EXPANDER_SAE_BACKEND``, else the fast one for the device.

    Raises:
        ValueError: unknown name.
        RuntimeError: the named backend is not available here, or runs on another device.
    """
    asked = backend or os.environ.get(BACKEND_VARIABLE) or None
    if asked is None:
        fast = "triton" if device.type == "cuda" else "cpu"
        usable = device.type in ("cpu", "cuda") and _BACKENDS[fast].available(device)
        return fast if usable else "reference"
    if asked not in _BACKENDS:
        raise ValueError(f"unknown backend {asked!r}; choose one of {', '.join(map(repr, _BACKENDS))}")
    if asked != "reference" and not _BACKENDS[asked].available(device):
        raise RuntimeError(f"backend {asked!r} cannot run on {device.type} here: {_BACKENDS[asked].why_not(device)}")
    return asked


def _implementation(name: str, backend: str, device: torch.device) -> Callable[..., Any]:
    return getattr(_BACKENDS[resolve_backend(backend, device)], name)


# An empty string stands for "no override": operator schemas take no optional strings in every supported torch.


@torch.library.custom_op("expander_sae::correlate", mutates_args=())
def _correlate(h: Tensor, rows: Tensor, values: Tensor, backend: str = "") -> Tensor:
    return _implementation("correlate", backend, h.device)(h, rows, values)


@_correlate.register_fake
def _(h: Tensor, rows: Tensor, values: Tensor, backend: str = "") -> Tensor:
    return h.new_empty(h.shape[0], rows.shape[0])


def _correlate_context(ctx, inputs, output) -> None:
    h, rows, values, ctx.backend = inputs
    ctx.save_for_backward(h, rows, values)


def _correlate_backward(ctx, grad: Tensor):
    # Dense by nature, every feature is active: matrix products, a block of features at a time to bound the memory.
    h, rows, values = ctx.saved_tensors
    wide = reference.accumulate_dtype(h.dtype)
    grad_h, grad_values = torch.zeros(h.shape, dtype=wide, device=h.device), []
    for start in range(0, rows.shape[0], reference.FEATURE_BLOCK):
        part = slice(start, start + reference.FEATURE_BLOCK)
        block = grad[:, part].to(wide)
        if ctx.needs_input_grad[0]:
            grad_h = grad_h + block @ reference.to_dense(rows[part], values[part].to(wide), h.shape[1]).T
        if ctx.needs_input_grad[2]:
            grad_values.append((block.T @ h.to(wide)).gather(1, rows[part].long()).to(values.dtype))
    return grad_h.to(h.dtype), None, torch.cat(grad_values) if grad_values else None, None


@torch.library.custom_op("expander_sae::encode", mutates_args=())
def _encode(
    h: Tensor,
    rows: Tensor,
    values: Tensor,
    b_enc: Tensor | None,
    center: Tensor | None,
    k: int,
    magnitude: bool,
    threshold: float,
    check_finite: bool,
    backend: str = "",
) -> tuple[Tensor, Tensor]:
    options = {"center": center, "magnitude": magnitude, "threshold": threshold, "check_finite": check_finite}
    return _implementation("encode", backend, h.device)(h, rows, values, b_enc, k, **options)


@_encode.register_fake
def _(h, rows, values, b_enc, center, k, magnitude, threshold, check_finite, backend=""):
    return h.new_empty(h.shape[0], k, dtype=torch.int32), h.new_empty(h.shape[0], k)


def _encode_context(ctx, inputs, output) -> None:
    h, rows, values, b_enc, center, _k, _magnitude, threshold, _check_finite, ctx.backend = inputs
    indices, code_values = output
    ctx.mark_non_differentiable(indices)
    ctx.thresholded = threshold > -math.inf
    ctx.bias_dtype = h.dtype if b_enc is None else b_enc.dtype
    ctx.save_for_backward(h, rows, values, center, indices, code_values)


def _encode_backward(ctx, _grad_indices, grad: Tensor):
    h, rows, values, center, indices, code_values = ctx.saved_tensors
    if ctx.thresholded:
        grad = grad * (code_values != 0)  # an empty slot depends on nothing
    grad_h = grad_values = grad_bias = grad_center = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[4]:
        grad_h = decode(indices, grad, rows, values, h.shape[1], ctx.backend)
    if ctx.needs_input_grad[2]:
        wide = reference.accumulate_dtype(h.dtype)
        read = h if center is None else h.to(wide) - center.to(wide)  # not rounded to 16 bits in between
        grad_values = values_grad(read, indices, grad.to(read.dtype), rows, ctx.backend).to(values.dtype)
    if ctx.needs_input_grad[3]:
        wide = reference.accumulate_dtype(grad.dtype)
        grad_bias = torch.zeros(rows.shape[0], dtype=wide, device=grad.device)
        grad_bias = grad_bias.index_add(0, indices.flatten(), grad.flatten().to(wide)).to(ctx.bias_dtype)
    if ctx.needs_input_grad[4]:
        assert grad_h is not None
        assert center is not None
        grad_center = -grad_h.sum(dim=0, dtype=reference.accumulate_dtype(h.dtype)).to(center.dtype)
    if not ctx.needs_input_grad[0]:
        grad_h = None
    return grad_h, None, grad_values, grad_bias, grad_center, None, None, None, None, None


@torch.library.custom_op("expander_sae::decode", mutates_args=())
def _decode(indices: Tensor, code_values: Tensor, rows: Tensor, values: Tensor, m: int, backend: str = "") -> Tensor:
    return _implementation("decode", backend, values.device)(indices, code_values, rows, values, m)


@_decode.register_fake
def _(indices, code_values, rows, values, m, backend=""):
    return code_values.new_empty(indices.shape[0], m)


def _decode_context(ctx, inputs, output) -> None:
    indices, code_values, rows, values, ctx.m, ctx.backend = inputs
    ctx.save_for_backward(indices, code_values, rows, values)


def _decode_backward(ctx, grad: Tensor):
    indices, code_values, rows, values = ctx.saved_tensors
    grad_code = grad_values = None
    if ctx.needs_input_grad[1]:
        grad_code = correlate_at(grad, indices, rows, values, ctx.backend)
    if ctx.needs_input_grad[3]:
        grad_values = values_grad(grad, indices, code_values, rows, ctx.backend).to(values.dtype)
    return None, grad_code, None, grad_values, None, None


@torch.library.custom_op("expander_sae::correlate_at", mutates_args=())
def _correlate_at(h: Tensor, indices: Tensor, rows: Tensor, values: Tensor, backend: str = "") -> Tensor:
    return _implementation("correlate_at", backend, h.device)(h, indices, rows, values)


@_correlate_at.register_fake
def _(h, indices, rows, values, backend=""):
    return h.new_empty(indices.shape)


def _correlate_at_context(ctx, inputs, output) -> None:
    h, indices, rows, values, ctx.backend = inputs
    ctx.save_for_backward(h, indices, rows, values)


def _correlate_at_backward(ctx, grad: Tensor):
    h, indices, rows, values = ctx.saved_tensors
    grad_h = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_h = decode(indices, grad, rows, values, h.shape[1], ctx.backend)
    if ctx.needs_input_grad[3]:
        grad_values = values_grad(h, indices, grad, rows, ctx.backend).to(values.dtype)
    return grad_h, None, None, grad_values, None


@torch.library.custom_op("expander_sae::values_grad", mutates_args=())
def _values_grad(h: Tensor, indices: Tensor, coef: Tensor, rows: Tensor, backend: str = "") -> Tensor:
    return _implementation("values_grad", backend, h.device)(h, indices, coef, rows)


@_values_grad.register_fake
def _(h, indices, coef, rows, backend=""):
    return h.new_empty(rows.shape, dtype=reference.accumulate_dtype(h.dtype))


def _values_grad_context(ctx, inputs, output) -> None:
    h, indices, coef, rows, ctx.backend = inputs
    ctx.save_for_backward(h, indices, coef, rows)


def _values_grad_backward(ctx, grad: Tensor):
    # Bilinear in h and coef, with `grad` in the place of the values.
    h, indices, coef, rows = ctx.saved_tensors
    grad = grad.to(h.dtype)
    grad_h = grad_coef = None
    if ctx.needs_input_grad[0]:
        grad_h = decode(indices, coef, rows, grad, h.shape[1], ctx.backend)
    if ctx.needs_input_grad[2]:
        grad_coef = correlate_at(h, indices, rows, grad, ctx.backend)
    return grad_h, None, grad_coef, None, None


@torch.library.custom_op("expander_sae::gram", mutates_args=())
def _gram(indices: Tensor, rows: Tensor, values: Tensor, m: int, backend: str = "") -> Tensor:
    return _implementation("gram", backend, values.device)(indices, rows, values, m)


@_gram.register_fake
def _(indices, rows, values, m, backend=""):
    return values.new_empty(*indices.shape, indices.shape[1])


def _gram_context(ctx, inputs, output) -> None:
    indices, rows, values, _m, _backend = inputs
    ctx.save_for_backward(indices, rows, values)


def _gram_backward(ctx, grad: Tensor):
    # w_i stands in row i and in column i of its sample's matrix. Plain PyTorch: no hot path takes this gradient.
    indices, rows, values = ctx.saved_tensors
    wide = reference.accumulate_dtype(grad.dtype)
    picked = indices.long()
    r, v = rows[picked], values.to(wide)[picked]
    shared = (r[:, :, None, :, None] == r[:, None, :, None, :]).to(wide)
    terms = torch.einsum("bij,bijtu,bju->bit", (grad + grad.mT).to(wide), shared, v)
    out = torch.zeros(rows.shape, dtype=wide, device=grad.device)
    return None, None, out.index_add(0, picked.flatten(), terms.flatten(0, 1)).to(values.dtype), None, None


def _differentiable(
    operator: CustomOpDef, context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """``operator`` with its derivative; takes all its arguments, by position.

    Under the transforms of ``torch.func`` it is called through a function of its own: they refuse the one that
    ``register_autograd`` makes.
    """
    operator.register_autograd(backward, setup_context=context)
    members = {"forward": operator, "setup_context": context, "backward": backward}
    functions = {name: staticmethod(function) for name, function in members.items()}
    transformed = type("Transformed", (torch.autograd.Function,), functions)

    def call(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return transformed.apply(*arguments)
        return operator(*arguments)

    return call


correlate = _differentiable(_correlate, _correlate_context, _correlate_backward)
encode = _differentiable(_encode, _encode_context, _encode_backward)
decode = _differentiable(_decode, _decode_context, _decode_backward)
correlate_at = _differentiable(_correlate_at, _correlate_at_context, _correlate_at_backward)
values_grad = _differentiable(_values_grad, _values_grad_context, _values_grad_backward)
gram = _differentiable(_gram, _gram_context, _gram_backward)
