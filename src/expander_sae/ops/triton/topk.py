"""Fused correlation and top-k: exact, deterministic, without the ``(B, n)`` scores.

1. *Bound*: score every ``stride``-th block of features and keep maxima over ``groups`` disjoint groups of features. The
   ``k``-th largest maximum of a sample bounds its ``k``-th largest score from below; with ``4k`` groups or more, about
   ``1.15·k·stride`` scores reach it, whatever their distribution (if features come in no periodic order).
2. *Collect*: score all features; what reaches the bound goes into its sample's list of candidates. Places in the list
   are given out by an atomic counter, in any order.
3. *Select*: sort the list by 64-bit keys that order by score, then by lower index. Keys are distinct, so the result
   does not depend on the order they came in.
4. *Overflow*: a sample with more candidates than room (thousands of equal scores, say) is done over by a running top-k
   through all features: slow, exact, and decided on the GPU, so that the processor never waits for a count.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false
# (What Triton compiles is not Python to a type checker, and triton may be absent.)

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expander_sae.ops.triton import scores
from expander_sae.ops.triton.scores import score_tile, unpack

BATCH_CHUNK = 1 << 15  # samples at once: bounds the candidates' memory
_SELECT_KEYS = 1024  # keys one program sorts, or as many samples as fit
_OVERFLOW_BLOCK = 512


@dataclass(frozen=True)
class Plan:
    """How a call is cut: blocks of features, the sample of them that makes the bound, room for candidates."""

    samples: int
    features: int
    blocks: int
    stride: int
    parts: int
    capacity: int

    @property
    def groups(self) -> int:
        return self.parts * self.features


def capacity(k: int, stride: int) -> int:
    """Room for the candidates of a sample: their mean and six standard deviations, as a power of two.

    About ``1.15·k`` scores of the blocks looked at reach the bound (how many draws fill ``k`` of ``4k`` groups); those
    of the other blocks that do follow a negative binomial distribution.
    """
    mean = 1.2 * k
    return triton.next_power_of_2(math.ceil(stride * (mean + 6 * math.sqrt(mean * (1 - 1 / stride))) + 16))


def plan(batch: int, m: int, n: int, d: int, k: int, itemsize: int) -> Plan:
    """The cheapest stride by an estimate (not measured yet): gathers for the bound against sorting more candidates."""
    size = scores.tiling(batch, m, n, itemsize)
    blocks = triton.cdiv(n, size.features)

    def cost(stride: int) -> float:
        room = capacity(k, stride)
        return n * d / stride + 2 * room * math.log2(room) ** 2

    strides = [stride for stride in (1, 2, 4, 8) if stride == 1 or n // stride >= 8 * k + size.features]
    stride = min(strides, key=cost)
    parts = min(triton.cdiv(blocks, stride), triton.cdiv(4 * k, size.features))
    return Plan(size.samples, size.features, blocks, stride, parts, capacity(k, stride))


@triton.jit
def _ordered(z):
    """int32 that orders as ``z`` does, with -0 equal to 0 and every NaN above infinity."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(z != z, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _unordered(order):
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _key(z, j, MAGNITUDE: tl.constexpr):
    """Score (or its magnitude), then lower index, then sign, in 64 bits. ``j`` has the shape of ``z``."""
    order = _ordered(tl.abs(z) if MAGNITUDE else z).to(tl.int64)
    low = ((j ^ 0x7FFFFFFF).to(tl.int64) << 1) | (z < 0).to(tl.int64)
    return (order << 32) | low


@triton.jit
def _store_code(keys, at, here, indices, code, MAGNITUDE: tl.constexpr):
    z = _unordered((keys >> 32).to(tl.int32))
    if MAGNITUDE:
        z = tl.where((keys & 1) != 0, -z, z)
    tl.store(indices + at, (((keys >> 1) & 0x7FFFFFFF) ^ 0x7FFFFFFF).to(tl.int32), mask=here)
    tl.store(code + at, z, mask=here)


@triton.jit
def _bound_kernel(
    tiles,
    words,
    padded,
    bias,
    maxima,
    m,
    n,
    blocks,
    parts,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    UNROLL: tl.constexpr,
    SB: tl.constexpr,
    BN: tl.constexpr,
    VALUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    tile = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    lane = tl.arange(0, BN)
    best = tl.full((BN, SB), float("-inf"), tl.float32)
    for block in range(part * STRIDE, blocks, parts * STRIDE):
        j = block * BN + lane
        z = score_tile(tiles + tile * SB * m, words, padded, bias, j, n, D, UNROLL, SB, BN, VALUE, HAS_BIAS)
        if MAGNITUDE:
            z = tl.abs(z)
        # The maximum passes over NaN: the bound is then that of the other scores, which is lower, so it still holds.
        best = tl.maximum(best, tl.where((j < n)[:, None], z, float("-inf")))
    b = tile * SB + tl.arange(0, SB)
    tl.store(maxima + b[:, None] * (parts * BN) + part * BN + lane[None, :], tl.trans(best))


@triton.jit
def _threshold_kernel(maxima, bounds, counts, batch, padded_batch, groups, k, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """``bounds[b]``: the ``k``-th largest of ``maxima[b]``, bit by bit. Also clears the counters."""
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    g = tl.arange(0, GROUPS)
    here = (b < padded_batch)[:, None] & (g < groups)[None, :]
    best = tl.load(maxima + b[:, None] * groups + g[None, :], mask=here, other=float("-inf"))
    order = _ordered(best).to(tl.int64) + 0x80000000  # 32 bits, not negative
    kth = tl.zeros((ROWS,), tl.int64)
    step = tl.full((ROWS,), 0x80000000, tl.int64)
    for _ in range(32):
        trial = kth | step
        reach = tl.sum((order >= trial[:, None]).to(tl.int32), axis=1)
        kth = tl.where(reach >= k, trial, kth)
        step = step >> 1
    bound = _unordered((kth - 0x80000000).to(tl.int32))
    # Samples that only fill up the last tile must not collect candidates.
    tl.store(bounds + b, tl.where(b < batch, bound, float("inf")), mask=b < padded_batch)
    tl.store(counts + b, tl.zeros((ROWS,), tl.int32), mask=b < padded_batch)


def _configs() -> list[triton.Config]:
    # Few fat programs on a multiprocessor share one tile in its L1; thin ones hide latency better: timed, not guessed.
    shapes = [(8, 4), (16, 1), (16, 2), (32, 1)]
    if os.environ.get("TRITON_INTERPRET") == "1":
        shapes = shapes[:1]  # nothing to time there
    return [triton.Config({"PROGRAMS": programs}, num_warps=warps) for warps, programs in shapes]


@triton.autotune(_configs(), key=["m", "n", "D", "SB", "BN", "STRIDE", "VALUE"], reset_to_zero=["counts"])
@triton.jit
def _collect_kernel(
    tiles,
    words,
    padded,
    bias,
    bounds,
    counts,
    listed_scores,
    listed_features,
    m,
    n,
    blocks,
    total,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    UNROLL: tl.constexpr,
    SB: tl.constexpr,
    BN: tl.constexpr,
    VALUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    CAPACITY: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    # Every program gets an equal run of (tile, block) pairs, tile by tile.
    programs = tl.num_programs(0)
    first = tl.program_id(0).to(tl.int64) * total // programs
    last = (tl.program_id(0) + 1).to(tl.int64) * total // programs
    lane = tl.arange(0, BN)
    for work in range(first, last):
        tile = work // blocks
        j = (work % blocks).to(tl.int32) * BN + lane
        z = score_tile(tiles + tile * SB * m, words, padded, bias, j, n, D, UNROLL, SB, BN, VALUE, HAS_BIAS)
        b = tile * SB + tl.arange(0, SB)
        bound = tl.load(bounds + b)
        below = (tl.abs(z) if MAGNITUDE else z) < bound[None, :]  # false for NaN
        candidate = (below == 0) & (j < n)[:, None]
        b_all = tl.broadcast_to(b[None, :], (BN, SB))
        place = tl.atomic_add(counts + b_all, 1, mask=candidate, sem="relaxed")
        at = b_all * CAPACITY + place
        here = candidate & (place < CAPACITY)
        # Not one key of 8 bytes: scores change threads here, through shared memory, and 4 bytes each are cheaper.
        tl.store(listed_scores + at, z, mask=here)
        tl.store(listed_features + at, tl.broadcast_to(j[:, None], (BN, SB)), mask=here)


@triton.jit
def _select_kernel(
    listed_scores,
    listed_features,
    counts,
    indices,
    code,
    batch,
    k,
    ROWS: tl.constexpr,
    CAPACITY: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, CAPACITY)
    count = tl.load(counts + b, mask=b < batch, other=0)
    here = place[None, :] < count[:, None]
    at = b[:, None] * CAPACITY + place[None, :]
    z = tl.load(listed_scores + at, mask=here, other=0.0)
    j = tl.load(listed_features + at, mask=here, other=0)
    keys = tl.sort(tl.where(here, _key(z, j, MAGNITUDE), -0x8000000000000000), dim=1, descending=True)
    whole = (count >= k) & (count <= CAPACITY)
    out = whole[:, None] & (place < k)[None, :]
    _store_code(keys, b[:, None] * k + place[None, :], out, indices, code, MAGNITUDE)


@triton.jit
def _overflow_kernel(
    h,
    stride_b,
    stride_m,
    words,
    padded,
    bias,
    counts,
    indices,
    code,
    n,
    k,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPACITY: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + b)
    if (count > CAPACITY) | (count < k):
        lane = tl.arange(0, BLOCK)
        best = tl.full((BLOCK,), -0x8000000000000000, tl.int64)
        for start in range(0, n, BLOCK):
            j = start + lane
            here = j < n
            z = tl.zeros((BLOCK,), tl.float32)
            for t in range(D):
                row, value = unpack(tl.load(words + t * padded.to(tl.int64) + j, mask=here, other=0), VALUE)
                x = tl.load(h + b * stride_b + row.to(tl.int64) * stride_m, mask=here, other=0.0)
                z = tl.fma(value, x.to(tl.float32), z)
            if HAS_BIAS:
                z += tl.load(bias + j, mask=here, other=0.0).to(tl.float32)
            new = tl.where(here, _key(z, j, MAGNITUDE), -0x8000000000000000)
            kth = tl.min(tl.where(lane < k, best, 0x7FFFFFFFFFFFFFFF), axis=0)
            if tl.max(new, axis=0) > kth:
                both = tl.sort(tl.reshape(tl.join(best, new), (2 * BLOCK,)), descending=True)
                half = tl.reshape(both, (2, BLOCK))
                best = tl.sum(tl.where(tl.arange(0, 2)[:, None] == 0, half, 0), axis=0)
        _store_code(best, b * k + lane, lane < k, indices, code, MAGNITUDE)


def encode_topk(
    h: Tensor, rows: Tensor, values: Tensor, bias: Tensor | None, k: int, magnitude: bool
) -> tuple[Tensor, Tensor]:
    """Indices int32 and values ``(B, k)``; arguments checked, all but ``h`` contiguous, nothing empty."""
    (batch, m), (n, d) = h.shape, rows.shape
    cut = plan(min(batch, BATCH_CHUNK), m, n, d, k, h.element_size())
    packed = scores.pack(rows, values, m)
    indices = torch.empty(batch, k, dtype=torch.int32, device=h.device)
    code = h.new_empty(batch, k)
    for start in range(0, batch, BATCH_CHUNK):
        part = slice(start, start + BATCH_CHUNK)
        _encode_chunk(h[part], packed, bias, k, magnitude, cut, n, indices[part], code[part])
    return indices, code


def _encode_chunk(
    h: Tensor,
    packed: scores.Packed,
    bias: Tensor | None,
    k: int,
    magnitude: bool,
    cut: Plan,
    n: int,
    indices: Tensor,
    code: Tensor,
) -> None:
    batch, m = h.shape
    words = packed.words
    d, padded = words.shape
    tiled = scores.tiles(h, cut.samples)
    count_tiles = tiled.shape[0]
    padded_batch = count_tiles * cut.samples
    shared = {
        "D": d,
        "UNROLL": scores.unroll(d),
        "SB": cut.samples,
        "BN": cut.features,
        "VALUE": packed.value,
        "HAS_BIAS": bias is not None,
        "MAGNITUDE": magnitude,
        "STRIDE": cut.stride,
    }
    pointer = words if bias is None else bias  # never read without a bias

    maxima = torch.empty(padded_batch, cut.groups, dtype=torch.float32, device=h.device)
    _bound_kernel[(count_tiles * cut.parts,)](
        tiled, words, padded, pointer, maxima, m, n, cut.blocks, cut.parts, **shared, num_warps=8
    )
    bounds = torch.empty(padded_batch, dtype=torch.float32, device=h.device)
    counts = torch.empty(padded_batch, dtype=torch.int32, device=h.device)
    group_width = triton.next_power_of_2(cut.groups)
    rows_at_once = max(1, _SELECT_KEYS // group_width)
    _threshold_kernel[(triton.cdiv(padded_batch, rows_at_once),)](
        maxima, bounds, counts, batch, padded_batch, cut.groups, k, ROWS=rows_at_once, GROUPS=group_width
    )
    del maxima

    # The samples that fill up the last tile have room too: a bias of NaN reaches any bound.
    listed_scores = torch.empty(padded_batch, cut.capacity, dtype=torch.float32, device=h.device)
    listed_features = torch.empty(padded_batch, cut.capacity, dtype=torch.int32, device=h.device)
    total = count_tiles * cut.blocks
    processors = _multiprocessors(h.device)
    _collect_kernel[lambda meta: (min(total, processors * meta["PROGRAMS"]),)](
        tiled,
        words,
        padded,
        pointer,
        bounds,
        counts,
        listed_scores,
        listed_features,
        m,
        n,
        cut.blocks,
        total,
        CAPACITY=cut.capacity,
        **shared,
    )
    rows_at_once = max(1, _SELECT_KEYS // cut.capacity)
    ending = {"CAPACITY": cut.capacity, "MAGNITUDE": magnitude}
    _select_kernel[(triton.cdiv(batch, rows_at_once),)](
        listed_scores, listed_features, counts, indices, code, batch, k, ROWS=rows_at_once, **ending
    )
    _overflow_kernel[(batch,)](
        h,
        h.stride(0),
        h.stride(1),
        words,
        padded,
        pointer,
        counts,
        indices,
        code,
        n,
        k,
        D=d,
        BLOCK=max(_OVERFLOW_BLOCK, triton.next_power_of_2(k)),
        VALUE=packed.value,
        HAS_BIAS=bias is not None,
        **ending,
        num_warps=8,
    )


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
