"""The largest entries of each row of a Gram matrix that comes in sparse blocks."""

from __future__ import annotations

import numpy as np
import scipy.sparse


def largest_partners(
    block: scipy.sparse.csr_matrix, start: int, count: int, *, whole: bool = False
) -> np.ndarray:
    """``(b, count)``: the largest magnitudes of each row, descending, the diagonal left out; zeros where there are fewer.

    Args:
        block: rows ``start : start + b`` of a Gram matrix. Its entries become magnitudes, its diagonal zero.
        start: see ``block``.
        count: entries per row, at least 1.
        whole: the entries are integers below 2¹⁵. Selection among so many equal floats would be slow.
    """
    np.abs(block.data, out=block.data)
    out = np.zeros((block.shape[0], count), dtype=block.data.dtype)
    for row in range(block.shape[0]):
        part = slice(block.indptr[row], block.indptr[row + 1])
        entries = block.data[part]
        entries[block.indices[part] == start + row] = 0
        if whole:
            entries = np.sort(entries.astype(np.int16), kind="stable")[-count:]  # by radix
        elif len(entries) > count:
            entries = np.sort(np.partition(entries, len(entries) - count)[-count:])
        else:
            entries = np.sort(entries)
        out[row, : len(entries)] = entries[::-1]
    return out
