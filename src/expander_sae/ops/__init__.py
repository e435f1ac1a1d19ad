"""The hot operations of a column-sparse dictionary, differentiable, on the fastest backend at hand.

``h`` is ``(..., m)``; a dictionary is ``rows`` int32 ``(n, d)`` and ``values (n, d)``. Every function takes
``backend=None | "reference" | "cpu" | "triton"``; ``None`` obeys ``EXPANDER_SAE_BACKEND`` and otherwise picks the C++
kernels for CPU tensors and Triton for CUDA, falling back to :mod:`expander_sae.ops.reference`, the definition of
correct. Errors are raised here, before a kernel sees the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expander_sae.ops import cpu, library
from expander_sae.ops.code import SparseCode
from expander_sae.ops.library import resolve_backend

__all__ = [
    "SparseCode",
    "correlate",
    "correlate_at",
    "decode",
    "encode_topk",
    "gram",
    "resolve_backend",
    "values_grad",
]


def correlate(h: Tensor, rows: Tensor, values: Tensor, *, m: int | None = None, backend: str | None = None) -> Tensor:
    """``Wᵀh``: ``(..., n)``. ``m``, if given, is checked against the width of ``h``."""
    flat = _flat(h, m)
    return library.correlate(flat, rows, values, backend or "").reshape(*h.shape[:-1], rows.shape[0])


def encode_topk(
    h: Tensor,
    rows: Tensor,
    values: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    relu: bool = False,
    magnitude: bool = False,
    m: int | None = None,
    backend: str | None = None,
) -> SparseCode:
    """The ``k`` largest entries of ``Wᵀh + b_enc`` as a code; see :func:`reference.encode_topk` for ties and NaN.

    Raises:
        ValueError: ``k`` outside ``[1, n]``, or ``b_enc`` not of shape ``(n,)``, or ``h`` not of width ``m``.
        TypeError: ``h`` is not floating point.
    """
    n = rows.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and d_sae = {n}, got {k}")
    if b_enc is not None and b_enc.shape != (n,):
        raise ValueError(f"b_enc must have shape ({n},), got {tuple(b_enc.shape)}")
    flat = _flat(h, m)
    indices, code = library.encode_topk(flat, rows, values, b_enc, k, relu, magnitude, backend or "")
    return SparseCode(indices, code).reshape(*h.shape[:-1])


def decode(code: SparseCode, rows: Tensor, values: Tensor, m: int, *, backend: str | None = None) -> Tensor:
    """``Wx``: ``(..., m)``."""
    flat = code.reshape(-1)
    out = library.decode(flat.indices, flat.values, rows, values, m, backend or "")
    return out.reshape(*code.batch_shape, m)


def correlate_at(
    h: Tensor, indices: Tensor, rows: Tensor, values: Tensor, *, m: int | None = None, backend: str | None = None
) -> Tensor:
    """Correlations with the named features only: ``(..., k)``."""
    flat = _flat(h, m)
    out = library.correlate_at(flat, indices.reshape(-1, indices.shape[-1]), rows, values, backend or "")
    return out.reshape(indices.shape)


def values_grad(h: Tensor, indices: Tensor, coef: Tensor, rows: Tensor, *, backend: str | None = None) -> Tensor:
    """``(n, d)``, summed over the batch; see :func:`reference.values_grad`."""
    k = indices.shape[-1]
    return library.values_grad(_flat(h, None), indices.reshape(-1, k), coef.reshape(-1, k), rows, backend or "")


def gram(indices: Tensor, rows: Tensor, values: Tensor, *, backend: str | None = None) -> Tensor:
    """Gram matrices of the supports: ``(..., k, k)``."""
    k = indices.shape[-1]
    return library.gram(indices.reshape(-1, k), rows, values, backend or "").reshape(*indices.shape, k)


def _flat(h: Tensor, m: int | None) -> Tensor:
    if not h.is_floating_point():
        raise TypeError(f"activations must be floating point, got {h.dtype}; convert them with .float()")
    if m is not None and h.shape[-1] != m:
        raise ValueError(f"activations have width {h.shape[-1]}, the dictionary has d_in = {m}")
    return h.reshape(-1, h.shape[-1])


def has_fast_cpu() -> bool:
    """Whether the C++ kernels were built into this installation."""
    return cpu.available(torch.device("cpu"))
