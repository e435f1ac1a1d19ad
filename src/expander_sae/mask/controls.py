"""Controls: masks that lack on purpose what an expander has."""

from __future__ import annotations

import numpy as np

from expander_sae.mask.draws import bounded, dealt, permutation, words
from expander_sae.mask.sampled import balanced, draw_by_weight, in_units

_ASSIGNED = 1 << 32  # first stream of the decks that say which column gets which support


def clustered(m: int, n: int, d: int, seed: int) -> np.ndarray:
    """Every column uses one of the ``⌊m / d⌋`` blocks of ``d`` neighbouring rows, drawn uniformly: the paper's control.

    Columns of one block have the same support. The last ``m mod d`` rows are used by no column. Source: arXiv
    2607.01799, "clustered-sparse"; its code has the same blocks and left-over rows.
    """
    block = bounded(words(seed, 0, n), m // d).astype(np.int32)
    return block[:, None] * np.int32(d) + np.arange(d, dtype=np.int32)


def shared(m: int, n: int, d: int, seed: int, supports: int | None = None) -> np.ndarray:
    """Few supports, each used by many columns: random ones that overlap, unlike the blocks of :func:`clustered`.

    The supports are a balanced mask of ``supports`` columns, so that ``supports · d >= m`` leaves no row out, and are
    dealt to the columns in equal numbers. Source: ours, to part the number of supports from their shape.

    Args:
        supports: how many, at most ``n``; default ``⌈m / d⌉``, the fewest that cover all rows.

    Raises:
        ValueError: ``supports`` out of range.
    """
    supports = min(n, -(-m // d)) if supports is None else supports
    if isinstance(supports, bool) or not isinstance(supports, int) or not 1 <= supports <= n:
        raise ValueError(f"supports must be an integer from 1 to d_sae = {n}, got {supports!r}")
    return balanced(m, supports, d, seed)[dealt(seed, _ASSIGNED, supports, n)]


def banded(m: int, n: int, d: int, seed: int) -> np.ndarray:
    """Every column uses ``d`` neighbouring rows, round the end to the beginning; all starts equally often.

    Neighbouring windows share up to ``d - 1`` rows. Source: ours; the circulant band of convolutional dictionaries.
    """
    start = dealt(seed, 0, m, n)
    rows = (start[:, None] + np.arange(d, dtype=np.int32)) % np.int32(m)
    rows.sort(axis=1)
    return rows


def hub(m: int, n: int, d: int, seed: int, alpha: float = 1.0) -> np.ndarray:
    """A few rows are used by very many columns: the row of rank ``i`` is drawn in proportion to ``i^-alpha``.

    The ranks are a random order of the rows; columns are drawn as those of
    :func:`~expander_sae.mask.sampled.weighted`, without a floor. Source: ours, after the degrees of scale-free graphs
    (Barabási & Albert 1999).

    Args:
        alpha: exponent in ``[0, 16]``; 0 for uniform rows.

    Raises:
        ValueError: ``alpha`` out of range, or so large that fewer than ``d`` rows can be drawn.
    """
    units = in_units(m, None, alpha, 0)
    rows = permutation(seed, 1, m)[draw_by_weight(units, n, d, seed)]
    rows.sort(axis=1)
    return rows
