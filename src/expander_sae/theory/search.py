"""Sets of columns that collide a lot: greedy, local search, and every set above a threshold.

The collisions of ``S`` are ``C(S) = d·|S| - |N(S)|``. All figures are integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse

from expander_sae.theory.graph import Graph, GrowingSet

_PRODUCTS = 1 << 24  # of a sparse product in the making
_MOST_SETS = 4_000_000


def greedy_chain(graph: Graph, start: list[int], size: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """From ``start`` on, always the column with the most rows in ``N(S)``; ties are broken at random.

    Returns:
        ``size`` columns in order, and the collisions of the first 1, 2, … of them.
    """
    tie_break = 0.5 * rng.random(graph.d_sae, dtype=np.float32)
    grown = GrowingSet(graph)
    collisions: list[int] = []
    for place in range(size):
        grown.add(start[place] if place < len(start) else grown.best(tie_break))
        collisions.append(grown.collisions)
    return grown.members, collisions


def local_search(graph: Graph, columns: list[int], rng: np.random.Generator, passes: int = 4) -> list[int]:
    """Swap single columns for better ones until none helps, at most ``passes`` times through the set."""
    tie_break = 0.5 * rng.random(graph.d_sae, dtype=np.float32)
    grown = GrowingSet(graph, columns)
    for _ in range(passes):
        before = grown.collisions
        for column in list(grown.members):
            with_it = grown.collisions
            grown.remove(column)
            better = grown.best(tie_break)
            grown.add(better if grown.collisions + grown.hits[better] > with_it else column)
        if grown.collisions == before:
            break
    return grown.members


def random_collisions(graph: Graph, size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """int64 ``(count,)``: the collisions of random sets of ``size`` columns: what is typical."""
    drawn = np.stack([rng.choice(graph.d_sae, size, replace=False) for _ in range(count)])
    used = np.sort(graph.rows[drawn].reshape(count, -1), axis=1)
    return (used[:, 1:] == used[:, :-1]).sum(axis=1)


def peel(collisions: int, size: int) -> int:
    """How many collisions some ``size - 1`` columns of a set with so many must have (docs/theory.md T14)."""
    return collisions - 2 * collisions // size


def pair_threshold(collisions: int, size: int) -> int:
    """The rows that two columns of a set with so many collisions must share."""
    for s in range(size, 2, -1):
        collisions = peel(collisions, s)
    return collisions


def largest_collisions(
    graph: Graph, size: int, known: int, pairs: np.ndarray, shared: np.ndarray, budget: int
) -> tuple[int, tuple[int, ...]] | None:
    """The set of ``size`` columns with the most collisions, if there is one with more than ``known``.

    Every set with ``c`` collisions holds a set of one column less with at least ``peel(c)``, so that all sets worth
    looking at grow from pairs that share enough rows, and sets that fall behind are cut off.

    Args:
        graph: of the mask.
        size: at least 2.
        known: collisions of a set already found.
        pairs: ``(p, 2)``: all pairs sharing at least ``pair_threshold(known + 1, size)`` rows.
        shared: ``(p,)``, how many they share.
        budget: the most entries of the mask to look up for sets of one size.

    Returns:
        Collisions and columns, ``(known, ())`` if nothing is better, ``None`` if the budget did not suffice.
    """
    needed = [known + 1]
    for s in range(size, 2, -1):
        needed.append(peel(needed[-1], s))
    needed.reverse()  # of 2, 3, … columns
    wanted = shared >= needed[0]
    sets, collisions = pairs[wanted], shared[wanted]
    by_row = scipy.sparse.csr_matrix(
        (np.ones(graph.rows.size, dtype=np.int32), graph.rows.ravel(), np.arange(0, graph.rows.size + 1, graph.degree)),
        shape=(graph.d_sae, graph.d_in),
    ).T.tocsr()
    for least in needed[1:]:
        grown = _extended(graph, by_row, sets, collisions, least, budget)
        if grown is None:
            return None
        sets, collisions = grown
    if not len(sets):
        return known, ()
    best = int(collisions.argmax())
    return int(collisions[best]), tuple(int(column) for column in sets[best])


def _extended(
    graph: Graph, by_row: scipy.sparse.csr_matrix, sets: np.ndarray, collisions: np.ndarray, least: int, budget: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """All sets of one column more with at least ``least`` collisions, each once."""
    found: list[np.ndarray] = [np.empty((0, sets.shape[1] + 1), dtype=np.int64)]
    counts: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    work = sets.shape[1] * graph.degree * -(-graph.rows.size // graph.d_in)
    work = np.where(collisions >= least, max(work, graph.d_sae), work)  # these meet every column
    if work.sum() > budget:
        return None
    at_once = max(1, _PRODUCTS // int(work.max(initial=1)))
    total = 0
    for start in range(0, len(sets), at_once):
        part, have = sets[start : start + at_once], collisions[start : start + at_once]
        which, column, gained = _hits(graph, by_row, part, have, least)
        total += len(which)
        if total > _MOST_SETS:
            return None
        found.append(np.concatenate([part[which], column[:, None]], axis=1))
        counts.append(have[which] + gained)
    grown = np.sort(np.concatenate(found), axis=1)
    distinct, first = np.unique(grown, axis=0, return_index=True)
    return distinct, np.concatenate(counts)[first]


def _hits(
    graph: Graph, by_row: scipy.sparse.csr_matrix, sets: np.ndarray, have: np.ndarray, least: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sets, columns outside them, and the rows these share with ``N(S)``, where that makes at least ``least``."""
    count, size = sets.shape
    used = graph.rows[sets].reshape(count, size * graph.degree)
    ends = np.arange(0, used.size + 1, used.shape[1])
    covered = scipy.sparse.csr_matrix((np.ones(used.size, dtype=np.int32), used.ravel(), ends), (count, graph.d_in))
    covered.sum_duplicates()
    covered.data[:] = 1
    product: Any = covered @ by_row
    hits = product.tocoo()
    which, column, gained = hits.row.astype(np.int64), hits.col.astype(np.int64), hits.data.astype(np.int64)
    free = np.flatnonzero(have >= least)  # these may take a column that shares no row with them
    if len(free):
        everything = np.zeros((len(free), graph.d_sae), dtype=np.int64)
        of_free = np.isin(which, free)
        everything[np.searchsorted(free, which[of_free]), column[of_free]] = gained[of_free]
        rest = ~of_free
        which = np.concatenate([which[rest], np.repeat(free, graph.d_sae)])
        column = np.concatenate([column[rest], np.tile(np.arange(graph.d_sae), len(free))])
        gained = np.concatenate([gained[rest], everything.ravel()])
    wanted = have[which] + gained >= least
    which, column, gained = which[wanted], column[wanted], gained[wanted]
    outside = (sets[which] != column[:, None]).all(axis=1)
    return which[outside], column[outside], gained[outside]
