"""What the operators refuse, checked once: shapes, types and devices. Backends rely on it."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_INDEX = 2**31 - 1


def floating(name: str, tensor: Tensor) -> Tensor:
    """``tensor`` if it is floating point of a type the operators take. Raises ``TypeError`` otherwise."""
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    return tensor


def flat(h: Tensor, m: int | None = None) -> Tensor:
    """``h (..., m)`` as ``(B, m)``. Raises ``TypeError`` if not floating point, ``ValueError`` for another width."""
    if not h.is_floating_point():
        raise TypeError(f"activations must be floating point, got {h.dtype}; convert them with .float()")
    if h.ndim == 0:
        raise ValueError("activations must have shape (..., d_in), got a single number")
    floating("activations", h)
    if m is not None and h.shape[-1] != m:
        raise ValueError(f"activations have width {h.shape[-1]}, the dictionary has d_in = {m}")
    return h.reshape(-1, h.shape[-1])


def matrix(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is floating point ``(B, ...)`` with two dimensions."""
    if tensor.ndim != 2:
        raise ValueError(f"{name} must be a matrix (B, ...), got shape {tuple(tensor.shape)}")
    floating(name, tensor)


def dictionary(rows: Tensor, values: Tensor | None = None) -> None:
    """Raise unless ``rows`` is int32 ``(n, d)`` and ``values``, if given, floating point of its shape."""
    if rows.ndim != 2:
        raise ValueError(f"rows must be (n, d), got shape {tuple(rows.shape)}")
    if rows.dtype != torch.int32:
        raise TypeError(f"rows must be int32, got {rows.dtype}; convert them with .to(torch.int32)")
    if rows.shape[0] > MAX_INDEX:
        raise ValueError(f"indices are int32: d_sae = {rows.shape[0]} is above {MAX_INDEX}")
    if values is not None:
        if values.shape != rows.shape:
            raise ValueError(f"values {tuple(values.shape)} and rows {tuple(rows.shape)} must have one shape (n, d)")
        floating("values", values)


def capacity(k: int, n: int) -> None:
    """Raise unless ``1 <= k <= n``."""
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and d_sae = {n}, got {k}")


def bias(name: str, tensor: Tensor | None, size: int) -> None:
    """Raise unless ``tensor`` is ``None`` or has shape ``(size,)``."""
    if tensor is not None and tensor.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {tuple(tensor.shape)}")


def indices(tensor: Tensor, batch: int | None = None) -> None:
    """Raise unless ``tensor`` is int32 ``(B, k)``."""
    if tensor.ndim != 2 or (batch is not None and tensor.shape[0] != batch):
        raise ValueError(f"indices must have shape ({'B' if batch is None else batch}, k), got {tuple(tensor.shape)}")
    if tensor.dtype != torch.int32:
        raise TypeError(f"indices must be int32, got {tensor.dtype}; convert them with .to(torch.int32)")


def code(name: str, tensor: Tensor, indices: Tensor) -> None:
    """Raise unless ``tensor`` has the shape of ``indices``."""
    if tensor.shape != indices.shape:
        raise ValueError(f"{name} {tuple(tensor.shape)} must have the shape of indices {tuple(indices.shape)}")


def one_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless all ``tensors`` are on ``device``."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the data on {device}: move them to one device")


def finite(h: Tensor) -> None:
    """Raise ``ValueError`` if a sample of ``h (B, m)`` holds NaN or infinity, and say how many do."""
    # One pass, no array of flags: a NaN or infinity survives the sum, unless it overflows by itself.
    if not bool(torch.isfinite(h.detach().sum(dtype=torch.float64))):
        not_finite(h)


def not_finite(h: Tensor) -> None:
    """As :func:`finite`, where a kernel has noticed something already."""
    bad = int((~torch.isfinite(h).all(dim=-1)).sum())
    if bad:
        raise ValueError(f"{bad} of the {h.shape[0]} activation vectors hold NaN or infinity; leave them out")
