"""Mask constructions by name. A new one is a function here (or in a plug-in) and its entry in :data:`CONSTRUCTIONS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from expander_sae.mask.draws import bounded, permutation, words
from expander_sae.registry import Registry

_CHUNK_CELLS = 1 << 24  # working memory of a draw: at most this many bytes of a column-by-row table

Draw = Callable[..., np.ndarray]
"""``draw(m, n, d, seed, **options)``: int32 ``(n, d)``, distinct rows in ``[0, m)``, ascending along the last axis."""


@dataclass(frozen=True)
class Construction:
    """How masks of one kind are drawn.

    Attributes:
        draw: see :data:`Draw`; its keyword arguments after ``seed`` are the options of the kind.
        version: raised when the same recipe draws other bits.
    """

    draw: Draw
    version: int = 1

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(inspect.signature(self.draw).parameters)[4:]


def left_regular(m: int, n: int, d: int, seed: int) -> np.ndarray:
    """Every column's support uniform over the sets of ``d`` rows, columns independent: the paper's mask.

    Floyd's sampling without replacement, all columns at once.
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
    deck deals each row once.
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


CONSTRUCTIONS: Registry[Construction] = Registry("mask kind")
"""Constructions by name."""
CONSTRUCTIONS.add("left-regular", Construction(left_regular))
CONSTRUCTIONS.add("balanced", Construction(balanced))
