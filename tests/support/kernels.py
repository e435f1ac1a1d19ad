"""What the tests of the C++ kernels share: problems whose sums are exact, and their answers by plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@dataclass
class Problem:
    """Samples, a dictionary and a code."""

    h: Tensor
    rows: Tensor
    values: Tensor
    b_enc: Tensor
    indices: Tensor
    code: Tensor

    @property
    def m(self) -> int:
        return self.h.shape[1]

    def scores(self) -> Tensor:
        """``Wᵀh + b_enc`` in float64, touching nothing outside the supports."""
        h, values = self.h.double(), self.values.double()
        gathered = h[:, self.rows.long().flatten()].reshape(h.shape[0], *self.rows.shape)
        return (gathered * values).sum(dim=-1) + self.b_enc.double()

    def dense(self) -> Tensor:
        """``W`` ``(m, n)`` in float64."""
        w = torch.zeros(self.values.shape[0], self.m, dtype=torch.float64)
        return w.scatter(1, self.rows.long(), self.values.double()).T


def problem(
    batch: int, m: int, n: int, d: int, k: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, whole: bool = True
) -> Problem:
    """A random problem. ``whole``: small integers, whose products and sums every type holds exactly, so that answers
    are equal to the last bit and full of ties; else Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int) -> Tensor:
        if whole:
            return torch.randint(-2, 3, shape, generator=generator).double()
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = torch.rand(n, m, generator=generator).topk(d, dim=1).indices.sort(dim=1).values.int()
    return Problem(
        h=draw(batch, m).to(dtype),
        rows=rows,
        values=draw(n, d).to(wide),
        b_enc=draw(n).to(wide),
        indices=torch.randint(0, n, (batch, k), generator=generator, dtype=torch.int32),
        code=draw(batch, k).to(dtype),
    )


def best(scores: Tensor, k: int, *, magnitude: bool = False, threshold: float = -math.inf) -> tuple[Tensor, Tensor]:
    """The ``k`` best by a full stable sort: NaN first, ties to the lower index; empty slots are 0, 0."""
    order = (scores.abs() if magnitude else scores).sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = scores.gather(1, order)
    empty = torch.zeros_like(chosen, dtype=torch.bool)
    if threshold > -math.inf:
        empty = (chosen.abs() if magnitude else chosen) <= threshold
    return order.int().masked_fill(empty, 0), chosen.masked_fill(empty, 0.0)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))
    )
