"""Masks drawn at random: the paper's, its balanced relative, and rows drawn by weight."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Context, Decimal

import numpy as np

from expander_sae.mask.draws import bounded, permutation, words

_CHUNK_CELLS = 1 << 24  # working memory of a draw: at most this many bytes of a column-by-row table
_UNITS = 1 << 30  # a row's probability is a whole number of these parts
_LARGEST_POWER, _LARGEST_WEIGHT = 16, 1e308
_WORD = 1 << 64


def left_regular(m: int, n: int, d: int, seed: int) -> np.ndarray:
    """Every column's support uniform over the sets of ``d`` rows, columns independent: the paper's mask.

    Source: arXiv 2607.01799. Floyd's sampling without replacement (Bentley & Floyd 1987), all columns at once.
    """
    raw = words(seed, 0, n * d).reshape(n, d)
    rows = np.empty((n, d), dtype=np.int32)
    chunk = max(1, _CHUNK_CELLS // m)
    for start in range(0, n, chunk):
        part = raw[start : start + chunk]
        column = np.arange(len(part))
        taken = np.zeros((len(part), m), dtype=bool)
        for t in range(d):
            last = m - d + t
            draw = bounded(part[:, t], last + 1).astype(np.int32)
            draw[taken[column, draw]] = last  # `last` cannot be taken yet: earlier draws were below it
            taken[column, draw] = True
            rows[start : start + chunk, t] = draw
    rows.sort(axis=1)
    return rows


def balanced(m: int, n: int, d: int, seed: int) -> np.ndarray:
    """Also right-regular: row degrees differ by at most one.

    The columns are dealt from shuffled decks of all ``m`` rows, one deck after the other. A column that straddles two
    decks must not get a row twice: in the new deck the rows it already holds are moved behind the cards it takes. Every
    deck deals each row once. Source: ours; the configuration model (Bollobás 1980) with its repairs built in.
    """
    cards = np.empty(n * d, dtype=np.int32)
    for deck in range(-(-n * d // m)):
        order = permutation(seed, 1 + deck, m)
        dealt = deck * m
        held = dealt % d  # cards the straddling column already holds
        if held:
            holds = np.isin(order, cards[dealt - held : dealt])
            free = np.flatnonzero(~holds)[: d - held]
            rest = np.delete(np.arange(m), free)
            order = order[np.concatenate([free, rest])]
        cards[dealt : dealt + m] = order[: n * d - dealt]
    rows = cards.reshape(n, d)
    rows.sort(axis=1)
    return rows


def bernoulli(m: int, n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Every entry is there with probability ``d / m``, independently: as many as a regular mask has, on average.

    A column that came out empty is drawn again, so it has ``d / (1 - (1 - d/m)^m)`` entries on average: 7.006 at
    ``d = 7``. Source: Erdős & Rényi 1959, the model without regularity of any kind.

    Returns:
        Rows ``(n, w)``, ``w`` the most entries of any column, and which of them are held: the others are padding.
    """
    counts = 1 + np.searchsorted(_binomial_limits(m, d), words(seed, 1, n), side="right")
    width = int(counts.max())
    rank = np.argsort(np.argsort(words(seed, 2, n * width).reshape(n, width), axis=1, kind="stable"), axis=1)
    # A random part of a random set: uniform among the sets of its size.
    return left_regular(m, n, width, seed), rank < counts[:, None]


def _binomial_limits(m: int, d: int) -> np.ndarray:
    """uint64: ``⌊2⁶⁴ · P(c <= i | c >= 1)⌋`` for ``i = 1, 2, …``, exact; ``c`` binomial, ``m`` trials at ``d / m``."""
    term, whole = m * d * (m - d) ** (m - 1), m**m - (m - d) ** m  # times m^m
    limits, total = [], 0
    for count in range(1, m):
        total += term
        limit = total * _WORD // whole
        if limit >= _WORD - 1:
            break
        limits.append(limit)
        term = term * (m - count) * d // ((count + 1) * (m - d)) if d < m else 0
    return np.array(limits, dtype=np.uint64)


def weighted(
    m: int, n: int, d: int, seed: int, weights: Sequence[float] | None = None, alpha: float = 0.5, floor: float = 0.1
) -> np.ndarray:
    """Rows drawn one after the other, each with probability ``(1 - floor) · w^alpha / Σ w^alpha + floor / m``.

    Of the rows that are left, in proportion: successive sampling without replacement. The weights are data, such as
    the variances of the coordinates, and are kept in the recipe. Without them row ``i`` has weight ``1 / (i + 1)``: a
    power law over rows in the order of their rank, as principal components come.

    The probabilities are whole multiples of ``2⁻³⁰``, powers taken in decimal arithmetic, so that the bits depend on no
    machine's ``pow``. Source: ours (docs/masks.md); successive sampling is Yates & Grundy 1953.

    Args:
        weights: one number for each row, not negative, not all zero.
        alpha: exponent in ``[0, 16]``; 0 for uniform rows.
        floor: share in ``[0, 1]`` that is spread evenly, so that no row is forgotten.

    Raises:
        ValueError: options out of range, or fewer than ``d`` rows with a probability above zero.
    """
    if weights is not None and len(weights) != m:
        raise ValueError(f"weights must have one number for each of the {m} rows, got {len(weights)}")
    return draw_by_weight(in_units(m, weights, alpha, floor), n, d, seed)


def in_units(m: int, weights: Sequence[float] | None, alpha: float, floor: float) -> np.ndarray:
    """int64 ``(m,)``: the probabilities of :func:`weighted` in parts of ``2³⁰``, rounded to the nearest.

    Raises:
        ValueError: options out of range.
    """
    for name, value, most in (("alpha", alpha, _LARGEST_POWER), ("floor", floor, 1)):
        if not 0 <= value <= most:
            raise ValueError(f"{name} must be in [0, {most}], got {value}")
    for row, weight in enumerate(weights or ()):
        if not 0 <= weight <= _LARGEST_WEIGHT:
            raise ValueError(f"weights must be finite and not negative, weight {row} is {weight}")
    exact = Context(prec=40)  # integers underneath: the same digits on every machine
    given = (exact.divide(1, row + 1) for row in range(m)) if weights is None else map(Decimal, weights)
    exponent, share = Decimal(alpha), Decimal(floor)
    powers = [exact.power(weight, exponent) if weight and alpha else Decimal(alpha == 0) for weight in given]
    total = Decimal(0)
    for power in powers:
        total = exact.add(total, power)
    if not total:
        raise ValueError("weights must not all be zero")
    by_weight = exact.multiply(_UNITS, exact.subtract(1, share))
    evenly = exact.divide(exact.multiply(_UNITS, share), m)
    parts = (exact.add(exact.divide(exact.multiply(by_weight, power), total), evenly) for power in powers)
    return np.array([int(exact.to_integral_value(part)) for part in parts], dtype=np.int64)


def draw_by_weight(units: np.ndarray, n: int, d: int, seed: int) -> np.ndarray:
    """Rows one after the other in proportion to whole ``units (m,)``, which sum to less than ``2³¹``; one word each.

    A draw points into the total of what is left; stepping over the rows already taken, in ascending order, finds its
    place among all.

    Raises:
        ValueError: fewer than ``d`` rows have units.
    """
    possible = int((units > 0).sum())
    if possible < d:
        raise ValueError(
            f"only {possible} rows have a probability of at least 2**-31, degree {d} needs as many: lower "
            "alpha, or raise floor where there is one"
        )
    ends = np.cumsum(units)
    starts = ends - units
    raw = words(seed, 0, n * d).reshape(n, d)
    rows = np.empty((n, d), dtype=np.int32)
    left = np.full(n, ends[-1])
    for t in range(d):
        point = bounded(raw[:, t], left).astype(np.int64)
        for taken in rows[:, :t].T:
            point += np.where(point >= starts[taken], units[taken], 0)
        drawn = np.searchsorted(ends, point, side="right")
        left -= units[drawn]
        rows[:, t] = drawn
        rows[:, : t + 1].sort(axis=1)
    return rows
