"""The hot operations of a column-sparse dictionary, differentiable, on the fastest backend at hand.

``h`` is ``(..., m)``; a dictionary is ``rows`` int32 ``(n, d)`` and ``values (n, d)``. Every function takes
``backend=None | "reference" | "cpu" | "triton"``; ``None`` obeys ``EXPANDER_SAE_BACKEND`` and otherwise picks the C++
kernels for CPU tensors and Triton for CUDA, falling back to :mod:`expander_sae.ops.reference`, the definition of
correct. Errors are raised here, before a kernel sees the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expander_sae.ops import arguments, cpu, library
from expander_sae.ops.code import SparseCode
from expander_sae.ops.library import resolve_backend
from expander_sae.ops.selection import Selection

__all__ = [
    "Selection",
    "SparseCode",
    "correlate",
    "correlate_at",
    "decode",
    "encode",
    "gram",
    "resolve_backend",
    "values_grad",
]


def correlate(h: Tensor, rows: Tensor, values: Tensor, *, m: int | None = None, backend: str | None = None) -> Tensor:
    """``Wᵀh``: ``(..., n)``. ``m``, if given, is checked against the width of ``h``."""
    flat = arguments.flat(h, m)
    return library.correlate(flat, rows, values, backend or "").reshape(*h.shape[:-1], rows.shape[0])


def encode(
    h: Tensor,
    rows: Tensor,
    values: Tensor,
    b_enc: Tensor | None,
    selection: Selection,
    *,
    center: Tensor | None = None,
    m: int | None = None,
    backend: str | None = None,
    check_finite: bool = False,
) -> SparseCode:
    """What ``selection`` takes of ``Wᵀ(h - center) + b_enc``; see :func:`reference.encode` for ties and NaN.

    Gradients flow to ``h``, ``values``, ``b_enc`` and ``center (m,)`` through filled slots. Centring and the look for
    NaN happen while the kernel loads ``h``.

    Raises:
        ValueError: a capacity above ``n``, ``b_enc`` not of shape ``(n,)``, ``center`` not of shape ``(m,)``, ``h`` not
            of width ``m``, or with ``check_finite`` NaN or infinity in ``h``.
        TypeError: ``h`` is not floating point.
    """
    n = rows.shape[0]
    selection.check(n)
    arguments.bias("b_enc", b_enc, n)
    flat = arguments.flat(h, m)
    arguments.bias("center", center, flat.shape[1])
    options = (selection.capacity, selection.magnitude, selection.floor, check_finite, backend or "")
    indices, margins = library.encode(flat, rows, values, selection.bias(b_enc), center, *options)
    return SparseCode(indices, selection.restore(indices, margins)).reshape(*h.shape[:-1])


def decode(code: SparseCode, rows: Tensor, values: Tensor, m: int, *, backend: str | None = None) -> Tensor:
    """``Wx``: ``(..., m)``."""
    flat = code.reshape(-1)
    out = library.decode(flat.indices, flat.values, rows, values, m, backend or "")
    return out.reshape(*code.batch_shape, m)


def correlate_at(
    h: Tensor, indices: Tensor, rows: Tensor, values: Tensor, *, m: int | None = None, backend: str | None = None
) -> Tensor:
    """Correlations with the named features only: ``(..., k)``."""
    flat = arguments.flat(h, m)
    out = library.correlate_at(flat, indices.reshape(-1, indices.shape[-1]), rows, values, backend or "")
    return out.reshape(indices.shape)


def values_grad(h: Tensor, indices: Tensor, coef: Tensor, rows: Tensor, *, backend: str | None = None) -> Tensor:
    """``(n, d)``, summed over the batch; see :func:`reference.values_grad`."""
    k = indices.shape[-1]
    return library.values_grad(arguments.flat(h), indices.reshape(-1, k), coef.reshape(-1, k), rows, backend or "")


def gram(indices: Tensor, rows: Tensor, values: Tensor, m: int, *, backend: str | None = None) -> Tensor:
    """Gram matrices of the supports: ``(..., k, k)``."""
    k = indices.shape[-1]
    return library.gram(indices.reshape(-1, k), rows, values, m, backend or "").reshape(*indices.shape, k)


def has_fast_cpu() -> bool:
    """Whether the C++ kernels were built into this installation."""
    return cpu.available(torch.device("cpu"))
