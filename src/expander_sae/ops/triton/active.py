"""Operations on active features only: decode, correlate_at, values_grad, gram.

Each sum has one owner and a fixed order, so results are the same bits run after run; nothing here is atomic.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false
# (What Triton compiles is not Python to a type checker, and triton may be absent.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SLOTS = 32  # active features a program of correlate_at, or one side of a program of gram
_FEATURES = 8  # features a program of values_grad: at a million features most are idle, and a program each costs more
_PAIRS = 32  # firings that values_grad gathers at once


@triton.jit
def _decode_kernel(indices, code, rows, values, out, m, k, D: tl.constexpr, LANES: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, LANES)
    here = t < D
    j = tl.load(indices + b * k).to(tl.int64)
    row = tl.load(rows + j * D + t, mask=here, other=0)
    add = tl.load(code + b * k).to(tl.float32) * tl.load(values + j * D + t, mask=here, other=0.0).to(tl.float32)
    for s in range(1, k + 1):
        # The next column is on its way while this one is added.
        following = b * k + tl.minimum(s, k - 1)
        j = tl.load(indices + following).to(tl.int64)
        next_row = tl.load(rows + j * D + t, mask=here, other=0)
        next_value = tl.load(values + j * D + t, mask=here, other=0.0).to(tl.float32)
        next_add = tl.load(code + following).to(tl.float32) * next_value
        at = out + b * m + row
        # Rows of a column are distinct, so lanes do not meet within a step; between steps they may.
        tl.store(at, tl.load(at, mask=here, other=0.0) + add, mask=here)
        tl.debug_barrier()
        row, add = next_row, next_add


def decode(indices: Tensor, code: Tensor, rows: Tensor, values: Tensor, m: int) -> Tensor:
    """``Wx``, ``(B, m)`` in the type of ``code``: a program a sample adds column after column, in float32."""
    (batch, k), d = indices.shape, rows.shape[1]
    out = torch.zeros(batch, m, dtype=torch.float32, device=code.device)
    lanes = triton.next_power_of_2(d)
    _decode_kernel[(batch,)](indices, code, rows, values, out, m, k, D=d, LANES=lanes, num_warps=_warps(lanes))
    return out.to(code.dtype)


@triton.jit
def _correlate_at_kernel(
    h,
    stride_b,
    stride_m,
    indices,
    rows,
    values,
    out,
    k,
    D: tl.constexpr,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    blocks = tl.cdiv(k, SLOTS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.program_id(0) % blocks * SLOTS + tl.arange(0, SLOTS)
    j = tl.load(indices + b * k + slot, mask=slot < k, other=0).to(tl.int64)
    acc = tl.zeros((SLOTS, LANES), tl.float32)
    for start in range(0, D, LANES):
        t = start + tl.arange(0, LANES)
        here = (slot < k)[:, None] & (t < D)[None, :]
        at = j[:, None] * D + t[None, :]
        row = tl.load(rows + at, mask=here, other=0).to(tl.int64)
        value = tl.load(values + at, mask=here, other=0.0).to(tl.float32)
        acc += value * tl.load(h + b * stride_b + row * stride_m, mask=here, other=0.0).to(tl.float32)
    tl.store(out + b * k + slot, tl.sum(acc, axis=1), mask=slot < k)


def correlate_at(h: Tensor, indices: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``(B, k)`` in the type of ``h``, which may have any strides."""
    (batch, k), d = indices.shape, rows.shape[1]
    out = h.new_empty(batch, k)
    slots = min(_SLOTS, triton.next_power_of_2(k))
    lanes = min(32, triton.next_power_of_2(d))
    _correlate_at_kernel[(batch * triton.cdiv(k, slots),)](
        h,
        h.stride(0),
        h.stride(1),
        indices,
        rows,
        values,
        out,
        k,
        D=d,
        LANES=lanes,
        SLOTS=slots,
        num_warps=_warps(slots * lanes),
    )
    return out


@triton.jit
def _values_grad_kernel(
    h,
    stride_b,
    stride_m,
    coef,
    rows,
    pairs,
    offsets,
    out,
    n,
    k,
    D: tl.constexpr,
    LANES: tl.constexpr,
    FEATURES: tl.constexpr,
    PAIRS: tl.constexpr,
):
    t = tl.program_id(1) * LANES + tl.arange(0, LANES)
    first = tl.program_id(0).to(tl.int64) * FEATURES
    for f in range(FEATURES):
        j = first + f
        if j < n:
            begin, end = tl.load(offsets + j), tl.load(offsets + j + 1)
            row = tl.load(rows + j * D + t, mask=t < D, other=0).to(tl.int64)
            acc = tl.zeros((PAIRS, LANES), tl.float32)
            for start in range(begin, end, PAIRS):
                p = start + tl.arange(0, PAIRS)
                pair = tl.load(pairs + p, mask=p < end, other=0)
                weight = tl.load(coef + pair, mask=p < end, other=0.0).to(tl.float32)
                here = (p < end)[:, None] & (t < D)[None, :]
                x = tl.load(h + (pair // k)[:, None] * stride_b + row[None, :] * stride_m, mask=here, other=0.0)
                acc += weight[:, None] * x.to(tl.float32)
            tl.store(out + j * D + t, tl.sum(acc, axis=0), mask=t < D)


def values_grad(h: Tensor, indices: Tensor, coef: Tensor, rows: Tensor) -> Tensor:
    """``(n, d)`` float32: firings are sorted by feature (stably: by sample within one), and each gathers its own."""
    (n, d), k = rows.shape, indices.shape[1]
    features, pairs = indices.flatten().sort(stable=True)
    offsets = torch.searchsorted(features, torch.arange(n + 1, dtype=torch.int32, device=h.device))
    out = torch.empty(n, d, dtype=torch.float32, device=h.device)
    lanes = min(32, triton.next_power_of_2(d))
    _values_grad_kernel[(triton.cdiv(n, _FEATURES), triton.cdiv(d, lanes))](
        h,
        h.stride(0),
        h.stride(1),
        coef,
        rows,
        pairs,
        offsets,
        out,
        n,
        k,
        D=d,
        LANES=lanes,
        FEATURES=_FEATURES,
        PAIRS=_PAIRS,
        num_warps=_warps(_PAIRS * lanes),
    )
    return out


@triton.jit
def _gram_kernel(indices, rows, values, out, k, D: tl.constexpr, SLOTS: tl.constexpr):
    blocks = tl.cdiv(k, SLOTS)
    b = (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    left = tl.program_id(0) // blocks % blocks * SLOTS + tl.arange(0, SLOTS)
    right = tl.program_id(0) % blocks * SLOTS + tl.arange(0, SLOTS)
    i = tl.load(indices + b * k + left, mask=left < k, other=0).to(tl.int64) * D
    j = tl.load(indices + b * k + right, mask=right < k, other=0).to(tl.int64) * D
    acc = tl.zeros((SLOTS, SLOTS), tl.float32)
    for t in range(D):
        row = tl.load(rows + i + t)
        value = tl.load(values + i + t).to(tl.float32)
        for u in range(D):
            shared = row[:, None] == tl.load(rows + j + u)[None, :]
            acc += tl.where(shared, value[:, None] * tl.load(values + j + u).to(tl.float32)[None, :], 0.0)
    at = out + (b * k + left)[:, None] * k + right[None, :]
    tl.store(at, acc, mask=(left < k)[:, None] & (right < k)[None, :])


def gram(indices: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``(B, k, k)`` in the type of ``values``: every entry of one column against every entry of the other."""
    (batch, k), d = indices.shape, rows.shape[1]
    out = values.new_empty(batch, k, k)
    slots = min(_SLOTS, triton.next_power_of_2(k))
    blocks = triton.cdiv(k, slots)
    _gram_kernel[(batch * blocks * blocks,)](
        indices, rows, values, out, k, D=d, SLOTS=slots, num_warps=_warps(slots * slots)
    )
    return out


def _warps(elements: int) -> int:
    """About 4 elements a thread."""
    return max(1, min(8, elements // 128))
