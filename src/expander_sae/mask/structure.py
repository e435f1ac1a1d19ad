"""The structure of a support: what its columns share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

_BLOCK_PRODUCTS = 1 << 25  # about 400 MB of a sparse product in the making
_COVERAGE_CELLS = 1 << 24  # bytes of a sample-by-row table


@dataclass(frozen=True)
class Overlap:
    """How many rows two columns share.

    Attributes:
        counts: ``counts[a]`` pairs of columns share ``a`` rows, ``a`` from 0 to the most there is.
    """

    counts: tuple[int, ...]

    @property
    def maximum(self) -> int:
        """The most rows that two columns share."""
        return len(self.counts) - 1

    @property
    def mean(self) -> float:
        """Shared rows over all pairs; 0 for a single column."""
        return sum(shared * count for shared, count in enumerate(self.counts)) / max(1, sum(self.counts))

    @property
    def four_cycles(self) -> int:
        """Cycles of length 4 in the bipartite graph: two columns, two rows they share."""
        return sum(comb(shared, 2) * count for shared, count in enumerate(self.counts))


def gram_blocks(rows: Tensor, values: Tensor, d_in: int) -> Iterator[tuple[int, scipy.sparse.csr_matrix]]:
    """``WᵀW`` in blocks of rows, sparse, in bounded memory.

    Args:
        rows: int ``(n, d)``, the support of each column of ``W``.
        values: ``(n, d)``, its entries; ones give the overlaps of the supports.
        d_in: rows ``m`` of ``W``.

    Yields:
        ``start`` and rows ``start : start + b`` of ``WᵀW``, float64 CSR ``(b, n)``, the diagonal included. Entries
        that cancel are stored as zeros.
    """
    n, d = rows.shape
    entries = values.detach().cpu().double().numpy().ravel()
    index = rows.cpu().numpy().ravel()
    transposed = scipy.sparse.csr_matrix((entries, index, np.arange(0, n * d + 1, d)), shape=(n, d_in))
    whole = transposed.T.tocsr()
    degrees = np.bincount(index, minlength=d_in)
    work = np.cumsum(degrees[rows.cpu().numpy()].sum(axis=1, dtype=np.int64))  # products for columns 0 to j
    start = 0
    while start < n:
        before = work[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(work, before + _BLOCK_PRODUCTS, side="right")))
        yield start, (transposed[start:end] @ whole).tocsr()
        start = end


def overlap(rows: Tensor, held: Tensor, d_in: int) -> Overlap:
    """Shared rows of all pairs of columns, exact.

    Args:
        rows: int ``(n, d)``, the support of each column.
        held: bool ``(n, d)``, which of them count.
        d_in: number of rows.
    """
    n, d = rows.shape
    counts = np.zeros(d + 1, dtype=np.int64)
    for _, block in gram_blocks(rows, held, d_in):
        counts += np.bincount(block.data.astype(np.int64), minlength=d + 1)
    counts -= np.bincount(held.sum(dim=1).cpu().numpy(), minlength=d + 1)  # a column with itself
    counts //= 2
    counts[0] = n * (n - 1) // 2 - counts[1:].sum()
    return Overlap(tuple(np.trim_zeros(counts, "b").tolist()) or (0,))


def girth(rows: Tensor, held: Tensor, d_in: int) -> int | None:
    """Length of the shortest cycle of the bipartite graph, exact; ``None`` if it has none.

    Arguments as :func:`overlap`. 4 if two columns share two rows. Else breadth first from every row, no deeper than the
    shortest cycle so far: where two paths from a row first meet, at depth ``l``, a cycle of at most ``2 l`` closes, and
    from a row of the shortest cycle it is that one.
    """
    own = held.sum(dim=1).cpu().numpy()
    for start, block in gram_blocks(rows, held, d_in):
        block.setdiag(0, k=start)
        if block.nnz and block.data.max() >= 2:
            return 4
    columns, places = held.cpu().numpy().nonzero()
    index = rows.cpu().numpy()[columns, places]
    by_column = scipy.sparse.csr_matrix((np.ones(len(index)), index, np.append(0, own.cumsum())), (len(rows), d_in))
    by_row = by_column.T.tocsr()
    shortest: int | None = None
    for root in range(d_in):
        nodes, parents = np.array([root]), np.array([-1])
        depth = 0
        while len(nodes) and (shortest is None or 2 * (depth + 1) < shortest):
            graph = by_column if depth % 2 else by_row
            depth += 1
            sizes = np.diff(graph.indptr)[nodes]
            first = np.repeat(graph.indptr[nodes] - sizes.cumsum() + sizes, sizes)
            found, back = graph.indices[first + np.arange(len(first))], np.repeat(parents, sizes)
            parents = np.repeat(nodes, sizes)[found != back]
            nodes = found[found != back]
            if len(np.unique(nodes)) < len(nodes):
                shortest = 2 * depth
        if shortest == 6:  # no shorter one is left
            break
    return shortest


def coverage(rows: Tensor, held: Tensor, d_in: int, indices: Tensor) -> Tensor:
    """int64 ``(B,)``: how many rows the columns ``indices (B, k)`` use together; a negative index names no column.

    Other arguments as :func:`overlap`.
    """
    counts = []
    for part in indices.long().split(max(1, _COVERAGE_CELLS // (d_in + 1))):
        named = part.clamp_min(0)
        use = held[named] & (part >= 0).unsqueeze(2)
        touched = torch.zeros(len(part), d_in + 1, dtype=torch.bool, device=rows.device)
        touched.scatter_(1, torch.where(use, rows[named].long(), d_in).flatten(1), True)
        counts.append(touched[:, :d_in].sum(dim=1))
    return torch.cat(counts)
