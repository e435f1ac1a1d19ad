"""Scores of a tile of samples against a block of features: the inner loop of encode and correlate.

A tile holds ``SB`` samples, transposed to ``(m, SB)``: the ``SB`` numbers that one mask entry gathers are neighbours,
at most a cache line or two, and the whole tile (``TILE_BYTES`` at most, while ``m`` is below 5120 in 16 bits, 2560 in
32) stays in the L1 cache while the dictionary streams by. The dictionary is repacked as ``(d, n)`` words that hold row
and value together: one load instead of two, of 4 bytes when values have 16 bits and ``m`` is at most 65536, else 8.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false
# (What Triton compiles is not Python to a type checker, and triton may be absent.)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 160 * 1024  # of the 228 to 256 KB that L1 and shared memory have together on an A100 or H100
TILE_SCORES = 4096  # scores a program keeps in registers at once
_MAX_UNROLL = 8  # loads in flight
_PACK_BLOCK = 256


@dataclass(frozen=True)
class Tiling:
    """``samples`` a tile, ``features`` a block."""

    samples: int
    features: int


def tiling(batch: int, m: int, n: int, itemsize: int) -> Tiling:
    """The most samples (16 to 64) whose tile fits the cache; fewer samples stream the dictionary more often."""
    samples = 64
    while samples > 16 and (m * samples * itemsize > TILE_BYTES or samples >= 2 * batch):
        samples //= 2
    return Tiling(samples, max(16, min(TILE_SCORES // samples, triton.next_power_of_2(n))))


@triton.jit
def _tile_kernel(h, out, batch, m, stride_b, stride_m, SB: tl.constexpr, MB: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * MB + tl.arange(0, MB)
    samples = tl.arange(0, SB)
    b = tile * SB + samples
    here = (b < batch)[:, None] & (columns < m)[None, :]
    x = tl.load(h + b[:, None] * stride_b + columns.to(tl.int64)[None, :] * stride_m, mask=here, other=0.0)
    at = out + tile * SB * m + columns[:, None] * SB + samples[None, :]
    tl.store(at, tl.trans(x), mask=(columns < m)[:, None])


def tiles(h: Tensor, samples: int) -> Tensor:
    """``(ceil(B / samples), m, samples)``: tiles of ``h (B, m)``, any strides, the last filled up with zeros."""
    batch, m = h.shape
    out = h.new_empty(triton.cdiv(batch, samples), m, samples)
    _tile_kernel[(out.shape[0], triton.cdiv(m, 64))](h, out, batch, m, h.stride(0), h.stride(1), SB=samples, MB=64)
    return out


@triton.jit
def _pack_kernel(rows, values, out, n, padded, D: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = j < n
    for t in range(D):
        row = tl.load(rows + j * D + t, mask=here, other=0)
        value = tl.load(values + j * D + t, mask=here, other=0.0)
        if VALUE == tl.float32:  # noqa: SIM300
            bits = value.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
            word = (row.to(tl.int64) << 32) | bits
        else:
            word = (row << 16) | (value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)
        tl.store(out + j.to(tl.int64) + t * padded.to(tl.int64), word, mask=j < padded)


@dataclass(frozen=True)
class Packed:
    """``words (d, padded)``, feature ``j`` in column ``j``; ``value`` is the type of the value inside a word."""

    words: Tensor
    value: tl.dtype


_SIXTEEN_BITS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def pack(rows: Tensor, values: Tensor, m: int) -> Packed:
    """``rows`` and ``values (n, d)``, contiguous, as one array of words."""
    n, d = rows.shape
    padded = triton.cdiv(n, _PACK_BLOCK) * _PACK_BLOCK
    value = _SIXTEEN_BITS.get(values.dtype, tl.float32) if m <= 1 << 16 else tl.float32
    words = rows.new_empty(d, padded, dtype=torch.int64 if value == tl.float32 else torch.int32)
    _pack_kernel[(padded // _PACK_BLOCK,)](rows, values, words, n, padded, D=d, VALUE=value, BLOCK=_PACK_BLOCK)
    return Packed(words, value)


@triton.jit
def unpack(word, VALUE: tl.constexpr):
    """Row (int32) and value (float32) of a word."""
    if VALUE == tl.float32:  # noqa: SIM300
        row = (word >> 32).to(tl.int32)
        value = (word & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        row = (word >> 16) & 0xFFFF
        value = (word & 0xFFFF).to(tl.int16).to(VALUE, bitcast=True).to(tl.float32)
    return row, value


@triton.jit
def _add_entry(acc, words, tile, j, samples, SB: tl.constexpr, VALUE: tl.constexpr):
    row, value = unpack(tl.load(words + j, eviction_policy="evict_first"), VALUE)
    x = tl.load(tile + row[:, None] * SB + samples[None, :])
    # An explicit fma: encode computes scores twice and compares them, so they must be the same bits both times.
    return tl.fma(tl.broadcast_to(value[:, None], acc.shape), x.to(tl.float32), acc)


@triton.jit
def score_tile(
    tile,
    words,
    padded,
    bias,
    j,
    n,
    D: tl.constexpr,
    UNROLL: tl.constexpr,
    SB: tl.constexpr,
    BN: tl.constexpr,
    VALUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """``(BN, SB)`` float32: features ``j`` (below ``padded``) against the samples of the tile at ``tile``."""
    samples = tl.arange(0, SB)
    stride = padded.to(tl.int64)  # d·n may pass 2³¹
    acc = tl.zeros((BN, SB), tl.float32)
    for start in range(0, D - D % UNROLL, UNROLL):
        for u in tl.static_range(UNROLL):
            acc = _add_entry(acc, words + (start + u) * stride, tile, j, samples, SB, VALUE)
    for u in tl.static_range(D % UNROLL):
        acc = _add_entry(acc, words + (D - D % UNROLL + u) * stride, tile, j, samples, SB, VALUE)
    if HAS_BIAS:
        acc += tl.load(bias + j, mask=j < n, other=0.0).to(tl.float32)[:, None]
    return acc


def unroll(d: int) -> int:
    """Entries in flight at once: the largest divisor of ``d`` up to 8, unless that is small."""
    best = max(u for u in range(1, _MAX_UNROLL + 1) if d % u == 0)
    return best if best >= 4 else min(d, _MAX_UNROLL)


@triton.jit
def _correlate_kernel(
    tiles,
    words,
    padded,
    out,
    batch,
    m,
    n,
    D: tl.constexpr,
    UNROLL: tl.constexpr,
    SB: tl.constexpr,
    BN: tl.constexpr,
    VALUE: tl.constexpr,
):
    blocks = tl.cdiv(n, BN)
    tile = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    z = score_tile(tiles + tile * SB * m, words, padded, words, j, n, D, UNROLL, SB, BN, VALUE, False)
    b = tile * SB + tl.arange(0, SB)
    tl.store(out + b[:, None] * n + j[None, :], tl.trans(z), mask=(b < batch)[:, None] & (j < n)[None, :])


def correlate(h: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``Wᵀh``, ``(B, n)`` in the type of ``h``; arguments checked and not empty."""
    (batch, m), (n, d) = h.shape, rows.shape
    size = tiling(batch, m, n, h.element_size())
    packed, tiled = pack(rows, values, m), tiles(h, size.samples)
    out = h.new_empty(batch, n)
    _correlate_kernel[(tiled.shape[0] * triton.cdiv(n, size.features),)](
        tiled,
        packed.words,
        packed.words.shape[1],
        out,
        batch,
        m,
        n,
        D=d,
        UNROLL=unroll(d),
        SB=size.samples,
        BN=size.features,
        VALUE=packed.value,
        num_warps=8,
    )
    return out
