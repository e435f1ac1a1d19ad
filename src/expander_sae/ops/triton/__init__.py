"""The hot operations in Triton, for CUDA. Same functions, same meaning as :mod:`expander_sae.ops.reference`.

Tested under ``TRITON_INTERPRET=1`` on CPU tensors and compiled for sm_90; **not measured on hardware yet**: the sizes
of tiles come from counted bytes, and ``benchmarks/gpu_check.py`` is the first thing to run where there is a GPU.

Results are the same bits run after run: no sum depends on the order in which programs finish. float64, empty tensors
and ``k`` above 1024 in ``encode`` take the reference. Entries of ``rows`` must lie in ``[0, m)`` and be distinct
within a feature (what :class:`expander_sae.mask.Mask` guarantees), and ``indices`` in ``[0, n)``: to check them here
would make the processor wait for the GPU at every call.
"""

from __future__ import annotations

import importlib.util
import math
import os

import torch
from torch import Tensor

from expander_sae.ops import arguments, reference

_MAX_K = 1024  # longer lists are sorted whole by one program: past this the reference is the better choice
_OLDEST_CAPABILITY = (7, 0)


def available(device: torch.device) -> bool:
    """Whether these kernels can run on ``device``."""
    return not why_not(device)


def why_not(device: torch.device) -> str:
    """Why :func:`available` says no; empty when it says yes."""
    if importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed (it comes with PyTorch for CUDA)"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST_CAPABILITY:
            return f"Triton needs compute capability 7.0, {torch.cuda.get_device_name(device)} has {capability}"
        return ""
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return ""
        return "on the CPU they only run interpreted, for tests: set TRITON_INTERPRET=1 before Python starts"
    return f"the Triton kernels work on CUDA tensors, not on {device.type}"


# The kernels are imported at the first call: this module must load without triton, and triton's import is slow.


def correlate(h: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``Wᵀh``, ``(B, n)``: ``z[b, j] = Σ_t values[j, t] · h[b, rows[j, t]]``.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes or devices do not fit.
    """
    _check(h, rows, values=values)
    if h.dtype == torch.float64 or not (h.numel() and rows.numel()):
        return reference.correlate(h, rows, values)
    from expander_sae.ops.triton import scores

    with _on(h):
        return scores.correlate(h.detach(), rows.contiguous(), values.detach().contiguous())


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

    Never holds ``(B, n)``: extra memory is a transposed copy of ``h``, one of the dictionary, and at most about
    ``150·k`` bytes per sample; see :mod:`expander_sae.ops.triton.topk` for how.

    Returns:
        indices int32 ``(B, k)`` and values ``(B, k)`` in the type of ``h``.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes or devices do not fit, or ``k`` is outside ``[1, n]``.
    """
    _check(h, rows, values=values)
    n = rows.shape[0]
    arguments.capacity(k, n)
    arguments.bias("b_enc", b_enc, n)
    arguments.bias("center", center, h.shape[1])
    arguments.one_device(h.device, b_enc=b_enc, center=center)
    if h.dtype == torch.float64 or not (h.numel() and rows.numel()) or k > _MAX_K:
        options = {"center": center, "magnitude": magnitude, "threshold": threshold, "check_finite": check_finite}
        return reference.encode(h, rows, values, b_enc, k, **options)
    from expander_sae.ops.triton import topk

    if check_finite:
        arguments.finite(h)
    bias = None if b_enc is None else b_enc.detach().contiguous()
    read = h.detach()
    if center is not None and h.dtype == torch.float32:
        read = read - center.detach().float()
    elif center is not None:  # a difference in 16 bits would be rounded before it is used: it goes into the bias
        taken = correlate(center.detach().float().unsqueeze(0), rows, values).squeeze(0)
        bias = -taken if bias is None else bias.float() - taken
    with _on(h):
        indices, code = topk.encode_topk(read, rows.contiguous(), values.detach().contiguous(), bias, k, magnitude)
    if threshold > -math.inf:
        empty = (code.abs() if magnitude else code) <= threshold
        indices, code = indices.masked_fill(empty, 0), code.masked_fill(empty, 0.0)
    return indices, code


def decode(indices: Tensor, code_values: Tensor, rows: Tensor, values: Tensor, m: int) -> Tensor:
    """``Wx``, ``(B, m)``: ``Σ_s code_values[b, s] · w_{indices[b, s]}``; a feature named twice counts twice.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes or devices do not fit.
    """
    _check(code_values, rows, values=values, indices=indices)
    arguments.code("code_values", code_values, indices)
    if code_values.dtype == torch.float64 or not (code_values.numel() and rows.numel() and m):
        return reference.decode(indices, code_values, rows, values, m)
    from expander_sae.ops.triton import active

    code, columns = code_values.detach().contiguous(), values.detach().contiguous()
    with _on(code_values):
        return active.decode(indices.contiguous(), code, rows.contiguous(), columns, m)


def correlate_at(h: Tensor, indices: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``(B, k)``: ``⟨w_{indices[b, s]}, h[b]⟩``, the correlations of named features only.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes or devices do not fit.
    """
    _check(h, rows, values=values, indices=indices)
    if h.dtype == torch.float64 or not (h.numel() and rows.numel() and indices.numel()):
        return reference.correlate_at(h, indices, rows, values)
    from expander_sae.ops.triton import active

    with _on(h):
        return active.correlate_at(h.detach(), indices.contiguous(), rows.contiguous(), values.detach().contiguous())


def values_grad(h: Tensor, indices: Tensor, coef: Tensor, rows: Tensor) -> Tensor:
    """``(n, d)`` float32: ``out[j, t] = Σ_{b, s: indices[b, s] = j} coef[b, s] · h[b, rows[j, t]]``.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes or devices do not fit.
    """
    _check(h, rows, indices=indices)
    arguments.code("coef", coef, indices)
    arguments.one_device(h.device, coef=coef)
    if h.dtype == torch.float64 or not (h.numel() and rows.numel() and indices.numel()):
        return reference.values_grad(h, indices, coef, rows)
    from expander_sae.ops.triton import active

    with _on(h):
        return active.values_grad(h.detach(), indices.contiguous(), coef.detach().contiguous(), rows.contiguous())


def gram(indices: Tensor, rows: Tensor, values: Tensor, m: int) -> Tensor:
    """``(B, k, k)``: ``⟨w_i, w_j⟩`` over each sample's support, in the type of ``values``. Work ``k²·d²`` a sample.

    Raises:
        TypeError: a tensor has a type the operation does not take.
        ValueError: shapes or devices do not fit.
    """
    _check(values, rows, values=values, indices=indices, same_batch=False)
    if values.dtype == torch.float64 or not (indices.numel() and rows.numel()):
        return reference.gram(indices, rows, values, m)
    from expander_sae.ops.triton import active

    with _on(values):
        return active.gram(indices.contiguous(), rows.contiguous(), values.detach().contiguous())


def _on(tensor: Tensor) -> torch.cuda.device_of:
    # Triton launches on the current device, wherever the tensors are.
    return torch.cuda.device_of(tensor)


def _check(
    data: Tensor, rows: Tensor, *, values: Tensor | None = None, indices: Tensor | None = None, same_batch: bool = True
) -> None:
    """Shapes, types and devices; ``data`` is the tensor whose type decides that of the result."""
    arguments.matrix("activations and codes", data)
    arguments.dictionary(rows, values)
    if indices is not None:
        arguments.indices(indices, data.shape[0] if same_batch else None)
    arguments.one_device(data.device, rows=rows, values=values, indices=indices)
