"""The hot operations in C++ (``csrc/``): fused gather, reduce and selection on 16 to 64 samples at a time.

Thin wrappers around ``expander_sae._kernels``: they check shapes, types and devices, bring inputs to the layout the
kernels read (contiguous; ``values`` and biases in the accumulation type) and allocate the results. Same functions, same
meaning as :mod:`expander_sae.ops.reference`. They use ``torch.get_num_threads()`` threads, and results do not depend on
how many those are, bit for bit. A process forked from this one starts with one thread.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expander_sae.ops import arguments
from expander_sae.ops.selection import Selection

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

_kernels: ModuleType | None
try:
    from expander_sae import _kernels
except ImportError as error:
    _kernels = None
    _reason = f"the C++ kernels are not in this installation ({error})"
    warnings.warn(
        f"{_reason}: operations on the CPU use the slower PyTorch reference. Reinstall with a C++ compiler "
        "(gcc or clang, 9 or newer) to build them.",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    _reason = ""


def _after_fork() -> None:
    # The child of a fork inherits PyTorch's OpenMP pool, but none of its threads: PyTorch's own operators then hang or
    # crash. One thread needs no pool.
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def available(device: torch.device | None = None) -> bool:
    """Whether the kernels were built, and run on ``device``."""
    return _kernels is not None and (device is None or device.type == "cpu")


def why_not(device: torch.device) -> str:
    """Why :func:`available` says no; empty when it says yes."""
    if _kernels is None:
        return _reason
    return "" if device.type == "cpu" else f"the C++ kernels work on CPU tensors, not on {device.type}"


def instruction_sets() -> list[str]:
    """Instruction sets this build and this processor both have, fastest first; the first is in use."""
    return _module().isas()


def correlate(h: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``Wᵀh``, ``(B, n)``: ``z[b, j] = Σ_t values[j, t] · h[b, rows[j, t]]``.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes do not fit, or an entry of ``rows`` is outside ``[0, m)``.
    """
    h = _activations("h", h)
    rows, values = _dictionary(rows, values, h.dtype)
    (batch, m), (n, d) = h.shape, rows.shape
    out = torch.empty(batch, n, dtype=h.dtype, device="cpu")
    tensors = {"h": h, "rows": rows, "values": values, "out": out}
    run_kernel("correlate", tensors, B=batch, m=m, n=n, d=d, dtype=_DTYPES[h.dtype])
    return out


def encode(
    h: Tensor,
    rows: Tensor,
    values: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    center: Tensor | None = None,
    magnitude: bool = False,
    threshold: float = -math.inf,
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """What :func:`expander_sae.ops.reference.encode` defines.

    Never holds ``(B, n)``: extra memory is the result plus, for each thread, ``m`` times up to 64 floats and the lists
    of candidates. Centring and the look for NaN happen while ``h`` is loaded.

    Returns:
        indices int32 ``(B, k)`` and values ``(B, k)`` in the type of ``h``.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes do not fit, ``k`` is outside ``[1, n]``, an entry of ``rows`` is outside ``[0, m)``, or with
            ``check_finite`` ``h`` holds NaN or infinity.
    """
    h = _activations("h", h)
    rows, values = _dictionary(rows, values, h.dtype)
    (batch, m), (n, d) = h.shape, rows.shape
    arguments.capacity(k, n)
    indices = torch.empty(batch, k, dtype=torch.int32, device="cpu")
    code = torch.empty(batch, k, dtype=h.dtype, device="cpu")
    tensors = {
        "h": h,
        "rows": rows,
        "values": values,
        "b_enc": _bias("b_enc", b_enc, n, values.dtype),
        "center": _bias("center", center, m, values.dtype),
        "out_indices": indices,
        "out_values": code,
    }
    sizes = {"B": batch, "m": m, "n": n, "d": d, "k": k, "dtype": _DTYPES[h.dtype]}
    finite = run_kernel("encode", tensors, **sizes, magnitude=magnitude, threshold=threshold)
    if check_finite and not finite:
        arguments.not_finite(h)
    return indices, code


def decode(indices: Tensor, code_values: Tensor, rows: Tensor, values: Tensor, m: int) -> Tensor:
    """``Wx``, ``(B, m)``: ``Σ_s code_values[b, s] · w_{indices[b, s]}``; a feature named twice counts twice.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes do not fit, or an index or row is out of range.
    """
    code_values = _activations("code_values", code_values)
    out = torch.empty(indices.shape[0], m, dtype=code_values.dtype, device="cpu")
    rows, values = _dictionary(rows, values, code_values.dtype)
    arguments.code("code_values", code_values, indices)
    indices = _indices(indices)
    _sparse("decode", code_values.dtype, m, indices=indices, code=code_values, rows=rows, values=values, out=out)
    return out


def correlate_at(h: Tensor, indices: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``(B, k)``: ``⟨w_{indices[b, s]}, h[b]⟩``, the correlations of named features only.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes do not fit, or an index or row is out of range.
    """
    h = _activations("h", h)
    indices = _indices(indices, h.shape[0])
    rows, values = _dictionary(rows, values, h.dtype)
    out = torch.empty(indices.shape, dtype=h.dtype, device="cpu")
    _sparse("correlate_at", h.dtype, h.shape[1], h=h, indices=indices, rows=rows, values=values, out=out)
    return out


def values_grad(h: Tensor, indices: Tensor, coef: Tensor, rows: Tensor) -> Tensor:
    """``(n, d)``: ``out[j, t] = Σ_{b, s: indices[b, s] = j} coef[b, s] · h[b, rows[j, t]]``, in the accumulation type.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes do not fit, or an index or row is out of range.
    """
    h = _activations("h", h)
    indices = _indices(indices, h.shape[0])
    arguments.code("coef", coef, indices)
    coef = _contiguous("coef", coef, h.dtype)
    arguments.dictionary(rows)
    rows = _contiguous("rows", rows, torch.int32)
    out = torch.empty(rows.shape, dtype=_wide(h.dtype), device="cpu")
    _sparse("values_grad", h.dtype, h.shape[1], h=h, indices=indices, code=coef, rows=rows, out=out)
    return out


def gram(indices: Tensor, rows: Tensor, values: Tensor, m: int) -> Tensor:
    """``(B, k, k)``: ``⟨w_i, w_j⟩`` over each sample's support, in the type of ``values``.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes do not fit, or an index or row is out of range.
    """
    dtype = values.dtype
    rows, values = _dictionary(rows, values, dtype)
    indices = _indices(indices)
    batch, k = indices.shape
    out = torch.empty(batch, k, k, dtype=dtype, device="cpu")
    _sparse("gram", dtype, m, indices=indices, rows=rows, values=values, out=out)
    return out


class TrainStep(NamedTuple):
    """What :func:`train_step` returns; everything but ``indices`` is in the accumulation type."""

    errors: Tensor
    """``(B,)``: ``‖residual[b]‖²``; the loss is their mean."""
    residual: Tensor
    """``(B, m)``: ``h - ĥ``."""
    indices: Tensor
    """int32 ``(B, k)``."""
    code: Tensor
    """``(B, k)``."""
    grad_values: Tensor
    """``(n, d)``: gradient of the loss by ``values``, through the encoder and the decoder."""
    grad_b_enc: Tensor
    """``(n,)``."""
    grad_b_dec: Tensor
    """``(m,)``."""


def train_step(
    h: Tensor, rows: Tensor, values: Tensor, b_enc: Tensor, b_dec: Tensor, selection: Selection
) -> TrainStep:
    """Forward and backward of a tied autoencoder under ``mean_b ‖h - ĥ‖²``, in one call.

    ``x`` is what ``selection`` (with one threshold for all features) takes of ``Wᵀ(h - b_dec) + b_enc``, and
    ``ĥ = W x + b_dec``, with the same ``W`` (given by ``rows`` and ``values`` as used: normalised if the dictionary is)
    in both. Nothing of size ``(B, m)`` is written but the residual.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes do not fit, a capacity above ``n``, the batch is empty, or a row is outside ``[0, m)``.
    """
    h = _activations("h", h)
    rows, values = _dictionary(rows, values, h.dtype)
    (batch, m), (n, d) = h.shape, rows.shape
    k = selection.capacity
    selection.check(n)
    if batch == 0:
        raise ValueError("the batch is empty: it has no mean error")
    wide = values.dtype
    out = TrainStep(
        errors=torch.empty(batch, dtype=wide, device="cpu"),
        residual=torch.empty(batch, m, dtype=wide, device="cpu"),
        indices=torch.empty(batch, k, dtype=torch.int32, device="cpu"),
        code=torch.empty(batch, k, dtype=wide, device="cpu"),
        grad_values=torch.empty(n, d, dtype=wide, device="cpu"),
        grad_b_enc=torch.empty(n, dtype=wide, device="cpu"),
        grad_b_dec=torch.empty(m, dtype=wide, device="cpu"),
    )
    biases = {"b_enc": _bias("b_enc", b_enc, n, wide), "b_dec": _bias("b_dec", b_dec, m, wide)}
    tensors = {"h": h, "rows": rows, "values": values, **biases, **out._asdict()}
    sizes = {"B": batch, "m": m, "n": n, "d": d, "k": k, "dtype": _DTYPES[h.dtype]}
    run_kernel("train_step", tensors, **sizes, magnitude=selection.magnitude, threshold=selection.floor)
    return out


def _module() -> ModuleType:
    if _kernels is None:
        raise RuntimeError(_reason)
    return _kernels


def run_kernel(name: str, tensors: Mapping[str, Tensor | None], **scalars: float) -> Any:
    """Call a kernel on the addresses of ``tensors`` (``None``: no address), with torch's threads.

    Raises:
        ValueError: an index or row is out of range.
    """
    addresses = {key: 0 if tensor is None else _storage(tensor).data_ptr() for key, tensor in tensors.items()}
    try:
        return getattr(_module(), name)(**addresses, **scalars, threads=torch.get_num_threads())
    except IndexError as error:
        raise ValueError(str(error)) from None


def _storage(tensor: Tensor) -> Tensor:
    # Within torch.func.grad tensors come wrapped, and so do those made there: a pursuit takes and fills what is inside.
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    while functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def _sparse(name: str, dtype: torch.dtype, m: int, **tensors: Tensor) -> None:
    (batch, k), (n, d) = tensors["indices"].shape, tensors["rows"].shape
    given = dict.fromkeys(("h", "indices", "code", "rows", "values", "out")) | tensors
    run_kernel(name, given, B=batch, m=m, n=n, d=d, k=k, dtype=_DTYPES[dtype])


def _bias(name: str, tensor: Tensor | None, size: int, dtype: torch.dtype) -> Tensor | None:
    arguments.bias(name, tensor, size)
    return None if tensor is None else _contiguous(name, tensor, dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _activations(name: str, tensor: Tensor) -> Tensor:
    arguments.matrix(name, tensor)
    return _contiguous(name, tensor, tensor.dtype)


def _contiguous(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; the C++ kernels take CPU tensors: use backend=None")
    return tensor.detach().to(dtype).contiguous()


def _dictionary(rows: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    arguments.dictionary(rows, values)
    return _contiguous("rows", rows, torch.int32), _contiguous("values", values, _wide(dtype))


def _indices(indices: Tensor, batch: int | None = None) -> Tensor:
    arguments.indices(indices, batch)
    return _contiguous("indices", indices, torch.int32)
