"""The hot operations in C++ (``csrc/``): fused gather, reduce and selection on 16 to 64 samples at a time.

Thin wrappers around ``expander_sae._kernels``: they check shapes, types and devices, bring inputs to the layout the
kernels read (contiguous; ``values`` and biases in the accumulation type) and allocate the results. Same functions, same
meaning as :mod:`expander_sae.ops.reference`. They use ``torch.get_num_threads()`` threads, and results do not depend on
how many those are, bit for bit.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_MAX_INDEX = 2**31 - 1

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
    run_kernel(
        "correlate", h.data_ptr(), rows.data_ptr(), values.data_ptr(), out.data_ptr(), batch, m, n, d, _DTYPES[h.dtype]
    )
    return out


def encode_topk(
    h: Tensor, rows: Tensor, values: Tensor, b_enc: Tensor | None, k: int, relu: bool = False, magnitude: bool = False
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest entries of ``Wᵀh + b_enc`` a sample, largest first, ties to the lower index, NaN before all.

    Never holds ``(B, n)``: extra memory is the result plus, for each thread, ``m`` times up to 64 floats and the lists
    of candidates. ``magnitude`` ranks by ``|z|`` and returns signed ``z``; ``relu`` clips the chosen values at 0.

    Returns:
        indices int32 ``(B, k)`` and values ``(B, k)`` in the type of ``h``.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes do not fit, ``k`` is outside ``[0, n]``, or an entry of ``rows`` is outside ``[0, m)``.
    """
    h = _activations("h", h)
    rows, values = _dictionary(rows, values, h.dtype)
    (batch, m), (n, d) = h.shape, rows.shape
    if not 0 <= k <= n:
        raise ValueError(f"k must be between 0 and d_sae = {n}, got {k}")
    if b_enc is not None:
        if b_enc.shape != (n,):
            raise ValueError(f"b_enc must have shape ({n},), got {tuple(b_enc.shape)}")
        b_enc = _contiguous("b_enc", b_enc, values.dtype)
    indices = torch.empty(batch, k, dtype=torch.int32, device="cpu")
    code = torch.empty(batch, k, dtype=h.dtype, device="cpu")
    run_kernel(
        "encode_topk",
        h.data_ptr(),
        rows.data_ptr(),
        values.data_ptr(),
        0 if b_enc is None else b_enc.data_ptr(),
        indices.data_ptr(),
        code.data_ptr(),
        batch,
        m,
        n,
        d,
        k,
        _DTYPES[h.dtype],
        bool(relu),
        bool(magnitude),
    )
    return indices, code


def decode(indices: Tensor, code_values: Tensor, rows: Tensor, values: Tensor, m: int) -> Tensor:
    """``Wx``, ``(B, m)``: ``Σ_s code_values[b, s] · w_{indices[b, s]}``; a feature named twice counts twice.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes do not fit, or an index or row is out of range.
    """
    code_values = _activations("code_values", code_values)
    indices = _indices(indices, code_values.shape)
    rows, values = _dictionary(rows, values, code_values.dtype)
    out = torch.empty(indices.shape[0], m, dtype=code_values.dtype, device="cpu")
    _sparse("decode", None, indices, code_values, rows, values, out, m, code_values.dtype)
    return out


def correlate_at(h: Tensor, indices: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``(B, k)``: ``⟨w_{indices[b, s]}, h[b]⟩``, the correlations of named features only.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes do not fit, or an index or row is out of range.
    """
    h = _activations("h", h)
    indices = _indices(indices, (h.shape[0], indices.shape[-1]))
    rows, values = _dictionary(rows, values, h.dtype)
    out = torch.empty(indices.shape, dtype=h.dtype, device="cpu")
    _sparse("correlate_at", h, indices, None, rows, values, out, h.shape[1], h.dtype)
    return out


def values_grad(h: Tensor, indices: Tensor, coef: Tensor, rows: Tensor) -> Tensor:
    """``(n, d)``: ``out[j, t] = Σ_{b, s: indices[b, s] = j} coef[b, s] · h[b, rows[j, t]]``, in the accumulation type.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes do not fit, or an index or row is out of range.
    """
    h = _activations("h", h)
    indices = _indices(indices, (h.shape[0], indices.shape[-1]))
    if coef.shape != indices.shape:
        raise ValueError(f"coef {tuple(coef.shape)} must have the shape of indices {tuple(indices.shape)}")
    coef = _contiguous("coef", coef, h.dtype)
    rows = _rows(rows)
    out = torch.empty(rows.shape, dtype=_wide(h.dtype), device="cpu")
    _sparse("values_grad", h, indices, coef, rows, None, out, h.shape[1], h.dtype)
    return out


def gram(indices: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``(B, k, k)``: ``⟨w_i, w_j⟩`` over each sample's support, in the type of ``values``.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes do not fit, or an index or row is out of range.
    """
    dtype = values.dtype
    rows, values = _dictionary(rows, values, dtype)
    indices = _indices(indices, indices.shape)
    batch, k = indices.shape
    out = torch.empty(batch, k, k, dtype=dtype, device="cpu")
    _sparse("gram", None, indices, None, rows, values, out, 0, dtype)
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
    h: Tensor, rows: Tensor, values: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, relu: bool = False
) -> TrainStep:
    """Forward and backward of a tied TopK autoencoder under ``mean_b ‖h - ĥ‖²``, in one call.

    ``x = TopK_k(Wᵀ(h - b_dec) + b_enc)``, ``ĥ = W x + b_dec``, with the same ``W`` (given by ``rows`` and ``values`` as
    used: normalised if the dictionary is) in both. Nothing of size ``(B, m)`` is written but the residual.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes do not fit, ``k`` is outside ``[1, n]``, the batch is empty, or a row is outside ``[0, m)``.
    """
    h = _activations("h", h)
    rows, values = _dictionary(rows, values, h.dtype)
    (batch, m), (n, d) = h.shape, rows.shape
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and d_sae = {n}, got {k}")
    if batch == 0:
        raise ValueError("the batch is empty: it has no mean error")
    for name, bias, size in (("b_enc", b_enc, n), ("b_dec", b_dec, m)):
        if bias.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {tuple(bias.shape)}")
    wide = values.dtype
    b_enc, b_dec = _contiguous("b_enc", b_enc, wide), _contiguous("b_dec", b_dec, wide)
    out = TrainStep(
        errors=torch.empty(batch, dtype=wide, device="cpu"),
        residual=torch.empty(batch, m, dtype=wide, device="cpu"),
        indices=torch.empty(batch, k, dtype=torch.int32, device="cpu"),
        code=torch.empty(batch, k, dtype=wide, device="cpu"),
        grad_values=torch.empty(n, d, dtype=wide, device="cpu"),
        grad_b_enc=torch.empty(n, dtype=wide, device="cpu"),
        grad_b_dec=torch.empty(m, dtype=wide, device="cpu"),
    )
    inputs = (h, rows, values, b_enc, b_dec)
    outputs = (out.indices, out.code, out.residual, out.errors, out.grad_values, out.grad_b_enc, out.grad_b_dec)
    pointers = (tensor.data_ptr() for tensor in (*inputs, *outputs))
    run_kernel("train_step", *pointers, batch, m, n, d, k, _DTYPES[h.dtype], bool(relu))
    return out


def _module() -> ModuleType:
    if _kernels is None:
        raise RuntimeError(_reason)
    return _kernels


def run_kernel(name: str, *arguments: int | float) -> None:
    """Call a kernel on addresses and sizes, with torch's threads. ``ValueError``: index out of range."""
    try:
        getattr(_module(), name)(*arguments, torch.get_num_threads())
    except IndexError as error:
        raise ValueError(str(error)) from None


def _sparse(
    name: str,
    h: Tensor | None,
    indices: Tensor,
    code: Tensor | None,
    rows: Tensor,
    values: Tensor | None,
    out: Tensor,
    m: int,
    dtype: torch.dtype,
) -> None:
    batch, k = indices.shape
    n, d = rows.shape
    pointers = (0 if tensor is None else tensor.data_ptr() for tensor in (h, indices, code, rows, values, out))
    run_kernel(name, *pointers, batch, m, n, d, k, _DTYPES[dtype])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _activations(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim != 2:
        raise ValueError(f"{name} must be a matrix (B, ...), got shape {tuple(tensor.shape)}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    return _contiguous(name, tensor, tensor.dtype)


def _contiguous(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; the C++ kernels take CPU tensors: use backend=None")
    return tensor.detach().to(dtype).contiguous()


def _rows(rows: Tensor) -> Tensor:
    if rows.ndim != 2:
        raise ValueError(f"rows must be (n, d), got shape {tuple(rows.shape)}")
    if rows.dtype != torch.int32:
        raise TypeError(f"rows must be int32, got {rows.dtype}; convert them with .to(torch.int32)")
    if rows.shape[0] > _MAX_INDEX:
        raise ValueError(f"indices are int32: d_sae = {rows.shape[0]} is above {_MAX_INDEX}")
    return _contiguous("rows", rows, torch.int32)


def _dictionary(rows: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if values.shape != rows.shape:
        raise ValueError(f"values {tuple(values.shape)} and rows {tuple(rows.shape)} must have one shape (n, d)")
    if values.dtype not in _DTYPES:
        raise TypeError(f"values must be float32, bfloat16, float16 or float64, got {values.dtype}")
    return _rows(rows), _contiguous("values", values, _wide(dtype))


def _indices(indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    if indices.ndim != 2 or tuple(indices.shape) != tuple(shape):
        raise ValueError(f"indices must have shape {tuple(shape)}, got {tuple(indices.shape)}")
    if indices.dtype != torch.int32:
        raise TypeError(f"indices must be int32, got {indices.dtype}; convert them with .to(torch.int32)")
    return _contiguous("indices", indices, torch.int32)
