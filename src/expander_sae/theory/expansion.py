"""How far sets of columns are from sharing no row: the expansion deficit of a mask, bracketed or exact.

``ε_s = max over |S| = s of 1 - |N(S)|/(d·s)`` (docs/theory.md D2). Everything is counted in collisions
``C(S) = d·s - |N(S)|``, which are integers, and handed out as fractions: no rounding decides a strict inequality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import scipy.linalg

from expander_sae.mask import Mask
from expander_sae.theory.graph import Graph
from expander_sae.theory.overlaps import Overlaps, overlaps
from expander_sae.theory.search import (
    greedy_chain,
    largest_collisions,
    local_search,
    pair_threshold,
    peel,
    random_collisions,
)

EXACT_UP_TO = 5
"""Set sizes that are searched exhaustively unless told otherwise."""

_BUDGET = 500_000_000  # entries of the mask that an exhaustive search may look up: seconds
_MOST_PAIRS = 2_000_000
_WIDEST_SPECTRUM = 1024  # rows of a mask whose singular values are computed: a second
_SPECTRAL_SLACK = 1e-9  # relative: far above the error of a symmetric eigenvalue problem in float64


@dataclass(frozen=True)
class Deficit:
    """``ε_s`` of a mask for one size of sets.

    Attributes:
        size: ``s``, columns in a set.
        degree: ``d``, rows of a column.
        found: collisions of ``witness``: some set of ``s`` columns has so many.
        bound: no set of ``s`` columns has more.
        witness: the columns of the worst set found.
        bounds: every upper bound by name, in collisions; ``bound`` is the least of them.
    """

    size: int
    degree: int
    found: int
    bound: int
    witness: tuple[int, ...]
    bounds: dict[str, int]

    @property
    def exact(self) -> bool:
        """Whether both ends agree."""
        return self.found == self.bound

    @property
    def lower(self) -> Fraction:
        """``ε_s`` is at least this: it can refute a theorem's condition, never prove it."""
        return Fraction(self.found, self.size * self.degree)

    @property
    def upper(self) -> Fraction:
        """``ε_s`` is at most this: proven for every set."""
        return Fraction(self.bound, self.size * self.degree)


def expansion_deficit(
    mask: Mask, s: int, *, exact_up_to: int = EXACT_UP_TO, starts: int = 8, seed: int = 0, budget: int = _BUDGET
) -> Deficit:
    """``ε_s`` for sets of exactly ``s`` columns.

    Args:
        mask: all columns of one degree.
        s: from 1 to ``d_sae``.
        exact_up_to: sets up to this size are searched exhaustively, as far as ``budget`` goes.
        starts: greedy chains to try.
        seed: of their starts and ties.
        budget: entries of the mask that the search for one size may look up; beyond, the bracket stays open.

    Raises:
        ValueError: ``s`` out of range, or a mask whose columns differ in degree.
    """
    options = {"exact_up_to": exact_up_to, "starts": starts, "seed": seed, "budget": budget}
    return expansion_deficits(mask, s, **options)[s - 1]


def expansion_deficits(
    mask: Mask, largest: int, *, exact_up_to: int = EXACT_UP_TO, starts: int = 8, seed: int = 0, budget: int = _BUDGET
) -> list[Deficit]:
    """``ε_s`` for every ``s`` from 1 to ``largest``. Arguments and errors as :func:`expansion_deficit`."""
    graph = Graph(mask)
    if not 1 <= largest <= graph.d_sae:
        raise ValueError(f"sets have from 1 to d_sae = {graph.d_sae} columns, not {largest}")
    rng = np.random.default_rng(seed)
    worst = _Worst(graph, largest, rng)
    worst.look(starts)
    searched = range(3, min(exact_up_to, largest) + 1)
    thresholds = {s: pair_threshold(worst.collisions(s) + 1, s) for s in searched}
    shared = overlaps(mask, max(1, largest - 1), min(thresholds.values(), default=graph.degree), _MOST_PAIRS)
    if largest > 1:
        worst.offer(_worst_pair(graph, shared))
    named = _bounds(graph, shared, largest, mask)
    all_bounds: list[dict[str, int]] = []
    least: list[int] = []
    for s in range(1, largest + 1):
        bounds = {name: int(values[s - 1]) for name, values in named.items()}
        if s > 1:
            bounds["peeling"] = _peeling_bound(least[-1], s, graph.degree)
        known = worst.collisions(s)
        if known < min(bounds.values()) and thresholds.get(s, 0) >= shared.threshold:
            best = largest_collisions(graph, s, known, shared.pairs, shared.shared, budget)
            if best is not None:
                bounds["exhaustive"] = best[0]
                worst.offer(best[1])
        if s <= exact_up_to:
            worst.grow(s)
        all_bounds.append(bounds)
        least.append(min(bounds.values()))
    return [
        Deficit(s, graph.degree, worst.collisions(s), least[s - 1], worst.sets[s - 1], all_bounds[s - 1])
        for s in range(1, largest + 1)
    ]


def expansion(deficits: Sequence[Deficit], largest: int) -> tuple[Fraction, Fraction]:
    """Both ends of ``ε(K) = max over s ≤ K of ε_s``, ``K = largest``.

    Args:
        deficits: of sizes 1, 2, … in order, at least ``largest`` of them.
        largest: ``K``.

    Raises:
        ValueError: fewer deficits than that.
    """
    if not 1 <= largest <= len(deficits):
        raise ValueError(f"the expansion of sets of up to {largest} columns needs the deficits of all these sizes")
    return max(one.lower for one in deficits[:largest]), max(one.upper for one in deficits[:largest])


def counting_floor(d_in: int, degree: int, s: int) -> Fraction:
    """``1 - m/(d·s)``, at least 0: no mask of these sizes has a smaller ``ε_s`` (docs/theory.md T1)."""
    return max(Fraction(0), 1 - Fraction(d_in, degree * s))


def sampled_deficits(mask: Mask, s: int, count: int, seed: int = 0) -> np.ndarray:
    """float64 ``(count,)``: ``1 - |N(S)|/(d·s)`` of random sets: what is typical, where ``ε_s`` is the worst."""
    graph = Graph(mask)
    return random_collisions(graph, s, count, np.random.default_rng(seed)) / (s * graph.degree)


class _Worst:
    """For each size the set with the most collisions found so far.

    Attributes:
        sets: of 1, 2, … columns.
    """

    def __init__(self, graph: Graph, largest: int, rng: np.random.Generator) -> None:
        self.graph, self.rng, self.largest = graph, rng, largest
        self.sets: list[tuple[int, ...]] = [()] * largest
        self._collisions = [-1] * largest

    def collisions(self, s: int) -> int:
        return self._collisions[s - 1]

    def offer(self, columns: Sequence[int]) -> None:
        """Take a set if it is the worst of its size."""
        if columns and (count := self.graph.collisions(columns)) > self.collisions(len(columns)):
            self.sets[len(columns) - 1], self._collisions[len(columns) - 1] = tuple(map(int, columns)), count

    def look(self, starts: int) -> None:
        """Greedy chains from so many columns, and local search for small sets and the largest."""
        graph = self.graph
        crowded = graph.row_degrees[graph.rows].sum(axis=1)  # columns on crowded rows meet many others
        first = np.argsort(-crowded, kind="stable")[: max(1, starts // 2)]
        others = self.rng.choice(graph.d_sae, min(graph.d_sae, max(0, starts - len(first))), replace=False)
        for start in [*first, *others]:
            self._chain([int(start)])
        for s in {*range(3, min(EXACT_UP_TO, self.largest) + 1), self.largest}:
            self.offer(local_search(graph, list(self.sets[s - 1]), self.rng))

    def grow(self, s: int) -> None:
        """Greedy chain from the worst set of ``s`` columns, and local search one size above."""
        self._chain(list(self.sets[s - 1]))
        if s < self.largest:
            self.offer(local_search(self.graph, list(self.sets[s]), self.rng))

    def _chain(self, start: list[int]) -> None:
        members, collisions = greedy_chain(self.graph, start, self.largest, self.rng)
        for s, count in enumerate(collisions, start=1):
            if count > self.collisions(s):
                self.sets[s - 1], self._collisions[s - 1] = tuple(members[:s]), count


def _worst_pair(graph: Graph, shared: Overlaps) -> tuple[int, int]:
    """Two columns that share ``a`` rows."""
    one = int(shared.stars[:, 0].argmax())
    common = np.isin(graph.rows, graph.rows[one]).sum(axis=1)
    common[one] = -1
    return one, int(common.argmax())


def _bounds(graph: Graph, shared: Overlaps, largest: int, mask: Mask) -> dict[str, np.ndarray]:
    """Upper bounds on the collisions of ``s`` columns, by name, each int64 ``(largest,)`` for ``s = 1, 2, …``."""
    s = np.arange(1, largest + 1)
    edges, a = graph.degree * s, shared.maximum
    pair = a * s * (s - 1) // 2
    star = np.zeros_like(s)
    for size in range(2, largest + 1):  # half the sum over S of what each column shares with the others
        column = shared.stars[:, size - 2]
        star[size - 1] = np.partition(column, len(column) - size)[len(column) - size :].sum() // 2
    named = {
        "pair overlap": pair,
        "star": star,
        "Corrádi": edges - -(-(graph.degree**2) * s // (graph.degree + a * (s - 1))),
        "shared pairs": edges - _fewest_rows(edges, np.minimum(pair, star)),
        "row degrees": edges - _rows_to_hold(graph, s),
    }
    spectral = _spectral(mask, graph, s)
    return named if spectral is None else named | {"spectral": spectral}


def _fewest_rows(edges: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The fewest rows on which ``edges`` entries make at most ``pairs`` pairs in one row (docs/theory.md T2)."""
    low, high = np.ones_like(edges), edges.copy()
    while (low < high).any():  # bisection: more rows, fewer pairs
        middle = (low + high) // 2
        each, rest = np.divmod(edges, middle)
        fits = (middle - rest) * (each * (each - 1) // 2) + rest * (each * (each + 1) // 2) <= pairs
        low, high = np.where(fits, low, middle + 1), np.where(fits, middle, high)
    return low


def _rows_to_hold(graph: Graph, sizes: np.ndarray) -> np.ndarray:
    """The fewest rows that can hold the entries of ``s`` columns: no row holds more than ``s``, nor than it has."""
    full = np.sort(graph.row_degrees)[::-1]
    return np.array([np.searchsorted(np.minimum(full, s).cumsum(), graph.degree * s) + 1 for s in sizes])


def _spectral(mask: Mask, graph: Graph, s: np.ndarray) -> np.ndarray | None:
    """Tanner's bound, with the first singular vector as it is in place of a uniform one (docs/theory.md T5)."""
    if not 2 <= mask.d_in <= _WIDEST_SPECTRUM:
        return None
    binary = mask.to_dense().double().cpu().numpy()
    last = mask.d_in - 1
    (second, first), vectors = scipy.linalg.eigh(binary @ binary.T, subset_by_index=(last - 1, last))
    slack = _SPECTRAL_SLACK * first
    right = np.sort(np.abs(binary.T @ vectors[:, 1]))[::-1] / np.sqrt(first)
    along = np.minimum(right.cumsum()[: len(s)] ** 2 * (1 + _SPECTRAL_SLACK), s)
    energy = (second + slack) * s + (first - second + slack) * along  # of Mᵀ M on the indicator of S
    edges = graph.degree * s
    return edges - np.ceil(edges**2 / energy - 1e-9).astype(np.int64)


def _peeling_bound(smaller: int, s: int, degree: int) -> int:
    """The most collisions of ``s`` columns if ``s - 1`` have at most ``smaller`` (docs/theory.md T14)."""
    most = smaller + degree  # one column adds no more than its degree
    while most > 0 and peel(most, s) > smaller:
        most -= 1
    return most
