"""The largest entries of each row of a Gram matrix that comes in sparse blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse


def largest_partners(block: scipy.sparse.csr_matrix, start: int, count: int, *, whole: bool = False) -> np.ndarray:
    """``(b, count)``: the largest magnitudes of each row off the diagonal, descending; zeros where there are fewer.

    Args:
        block: rows ``start : start + b`` of a Gram matrix. Its entries become magnitudes, its diagonal zero.
        start: see ``block``.
        count: entries per row, at least 1.
        whole: the entries are integers below 2¹⁵. Selection among so many equal floats would be slow.
    """
    data, columns, ends = _arrays(block)
    np.abs(data, out=data)
    out = np.zeros((len(ends) - 1, count), dtype=data.dtype)
    for row in range(len(ends) - 1):
        part = slice(ends[row], ends[row + 1])
        entries = data[part]
        entries[columns[part] == start + row] = 0
        if whole:
            entries = np.sort(entries.astype(np.int16), kind="stable")[-count:]  # by radix
        elif len(entries) > count:
            entries = np.sort(np.partition(entries, len(entries) - count)[-count:])
        else:
            entries = np.sort(entries)
        out[row, : len(entries)] = entries[::-1]
    return out


def entries_from(block: scipy.sparse.csr_matrix, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and values of the entries of at least ``least``."""
    data, columns, ends = _arrays(block)
    place = np.flatnonzero(data >= least)
    return np.searchsorted(ends, place, side="right") - 1, columns[place].astype(np.int64), data[place]


def _arrays(block: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, their columns, and where each row ends: what scipy's type stubs say too little of."""
    return block.data, block.indices, block.indptr
