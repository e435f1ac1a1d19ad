"""The definition of correct: every hot operation in plain PyTorch.

Shapes: ``h (B, m)``, ``rows`` int32 ``(n, d)``, ``values (n, d)``, ``indices`` int32 ``(B, k)``. The dictionary is
``W[rows[j, t], j] = values[j, t]``. 16-bit inputs are multiplied, accumulated and selected in float32 and the result
is rounded once; float64 stays float64. Memory is bounded by working through features in blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expander_sae.ops import arguments

FEATURE_BLOCK = 1 << 14  # features scored at once: bounds the dense block at m x 16384 and the scores at B x 16384


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_dense(rows: Tensor, values: Tensor, m: int) -> Tensor:
    """``(m, n)``: the dictionary with its zeros."""
    dense = values.new_zeros(values.shape[0], m)
    return dense.scatter(1, rows.long(), values).T


def correlate(h: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``Wᵀh``, ``(B, n)``: ``z[b, j] = Σ_t values[j, t] · h[b, rows[j, t]]``."""
    wide = accumulate_dtype(h.dtype)
    blocks = [
        h.to(wide)
        @ to_dense(rows[start : start + FEATURE_BLOCK], values[start : start + FEATURE_BLOCK].to(wide), h.shape[1])
        for start in range(0, rows.shape[0], FEATURE_BLOCK)
    ]
    out = torch.cat(blocks, dim=1)
    spoilt = (~torch.isfinite(h).all(dim=1)).nonzero().flatten()
    if spoilt.numel():  # the zeros of the dense block times NaN or infinity are NaN: sum over the supports alone
        out[spoilt] = torch.stack([(values.to(wide) * sample[rows.long()]).sum(dim=1) for sample in h[spoilt].to(wide)])
    return out.to(h.dtype)


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
    """The ``k`` largest entries of ``z = Wᵀ(h - center) + b_enc`` per sample, largest first, ties to the lower index.

    ``magnitude`` ranks by ``|z|`` and returns signed ``z``. What is ranked and does not exceed ``threshold`` leaves its
    slot empty: index 0, value 0. NaN ranks first (as in ``torch.topk``) and exceeds every threshold, so a bad input
    shows in the code instead of vanishing.

    Returns:
        indices int32 ``(B, k)`` and values ``(B, k)``.

    Raises:
        ValueError: with ``check_finite``, NaN or infinity in ``h``.
    """
    if check_finite:
        arguments.finite(h)
    wide = accumulate_dtype(h.dtype)
    dtype, h = h.dtype, h.to(wide)
    if center is not None:
        h = h - center.to(wide)
    best_z = h.new_empty(h.shape[0], 0, dtype=wide)
    best_j = torch.empty(h.shape[0], 0, dtype=torch.int64, device=h.device)
    for start in range(0, rows.shape[0], FEATURE_BLOCK):
        stop = min(start + FEATURE_BLOCK, rows.shape[0])
        z = correlate(h, rows[start:stop], values[start:stop])
        if b_enc is not None:
            z = z + b_enc[start:stop].to(wide)
        # Best so far stands before the block, so position order stays index order among equals.
        candidates = torch.cat([best_z, z], dim=1)
        keep = top_positions(candidates.abs() if magnitude else candidates, min(k, candidates.shape[1]))
        features = torch.cat([best_j, torch.arange(start, stop, device=h.device).expand(h.shape[0], -1)], dim=1)
        best_z, best_j = candidates.gather(1, keep), features.gather(1, keep)
    if threshold > -math.inf:
        empty = (best_z.abs() if magnitude else best_z) <= threshold
        best_j, best_z = best_j.masked_fill(empty, 0), best_z.masked_fill(empty, 0.0)
    return best_j.to(torch.int32), best_z.to(dtype)


def top_positions(score: Tensor, k: int) -> Tensor:
    """Positions of the ``k`` largest a row, descending, ties to the lower position; NaN counts as largest.

    ``torch.topk`` leaves the order of equals open, and a full stable sort is slow: rows whose ``k``-th value is tied
    with the next (rare) are sorted in full, the others only among the chosen.
    """
    n = score.shape[1]
    top, position = torch.topk(score, min(k + 1, n), dim=1)
    position = position[:, :k]
    if 0 < k < n:
        last, following = top[:, k - 1], top[:, k]
        tied = ((last == following) | (last.isnan() & following.isnan())).nonzero().flatten()
        if tied.numel():
            position[tied] = score[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    position = position.sort(dim=1).values
    order = score.gather(1, position).sort(dim=1, descending=True, stable=True).indices
    return position.gather(1, order)


def decode(indices: Tensor, code_values: Tensor, rows: Tensor, values: Tensor, m: int) -> Tensor:
    """``Wx``, ``(B, m)``: ``Σ_s code_values[b, s] · w_{indices[b, s]}``; a feature named twice counts twice."""
    wide = accumulate_dtype(code_values.dtype)
    batch = indices.shape[0]
    picked = indices.long()
    contributions = code_values.to(wide).unsqueeze(-1) * values.to(wide)[picked]
    out = torch.zeros(batch, m, dtype=wide, device=values.device)
    out = out.scatter_add(1, rows[picked].long().flatten(1), contributions.flatten(1))
    return out.to(code_values.dtype)


def correlate_at(h: Tensor, indices: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``(B, k)``: ``⟨w_{indices[b, s]}, h[b]⟩``, the correlations of named features only."""
    wide = accumulate_dtype(h.dtype)
    picked = indices.long()
    at = h.to(wide).unsqueeze(1).expand(-1, indices.shape[1], -1).gather(2, rows[picked].long())
    return (at * values.to(wide)[picked]).sum(dim=-1).to(h.dtype)


def values_grad(h: Tensor, indices: Tensor, coef: Tensor, rows: Tensor) -> Tensor:
    """``(n, d)``: ``out[j, t] = Σ_{b, s: indices[b, s] = j} coef[b, s] · h[b, rows[j, t]]``.

    The gradient of ``values`` for encode (``coef`` = gradient of the chosen scores) and for decode (``h`` = gradient
    of the output, ``coef`` = the code), over active features only. Returned in the accumulation type: it is a sum
    over the batch and belongs to ``values``, whose type may be wider than ``h``'s.
    """
    wide = accumulate_dtype(h.dtype)
    picked = indices.long()
    at = h.to(wide).unsqueeze(1).expand(-1, indices.shape[1], -1).gather(2, rows[picked].long())
    out = torch.zeros(rows.shape, dtype=wide, device=h.device)
    out.index_add_(0, picked.flatten(), (at * coef.to(wide).unsqueeze(-1)).reshape(-1, rows.shape[1]))
    return out


def gram(indices: Tensor, rows: Tensor, values: Tensor, m: int) -> Tensor:
    """``(B, k, k)``: ``⟨w_i, w_j⟩`` over each sample's support; only shared rows contribute."""
    wide = accumulate_dtype(values.dtype)
    picked = indices.long()
    r, v = rows[picked], values.to(wide)[picked]  # (B, k, d)
    shared = r[:, :, None, :, None] == r[:, None, :, None, :]
    products = v[:, :, None, :, None] * v[:, None, :, None, :]
    return (products * shared).sum(dim=(-1, -2)).to(values.dtype)
