"""The structure of a support: what its columns share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse
from torch import Tensor

_BLOCK_PRODUCTS = 1 << 25  # about 400 MB of a sparse product in the making


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
