"""A mask as a bipartite graph: which columns use a row, and a set of columns that grows and shrinks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from expander_sae.mask import Mask


class Graph:
    """A regular mask, by columns and by rows.

    Attributes:
        rows: int64 ``(n, d)``, the rows of each column.
        d_in: ``m``.
        row_degrees: int64 ``(m,)``.
    """

    def __init__(self, mask: Mask) -> None:
        refuse_irregular(mask)
        self.rows = mask.rows.cpu().numpy().astype(np.int64)
        self.d_in = mask.d_in
        flat = self.rows.ravel()
        self.row_degrees = np.bincount(flat, minlength=self.d_in)
        self._columns = np.argsort(flat, kind="stable") // self.degree
        self._starts = np.concatenate([[0], np.cumsum(self.row_degrees)])

    @property
    def d_sae(self) -> int:
        return self.rows.shape[0]

    @property
    def degree(self) -> int:
        return self.rows.shape[1]

    def columns_of(self, row: int) -> np.ndarray:
        """The columns that use a row, ascending."""
        return self._columns[self._starts[row] : self._starts[row + 1]]

    def collisions(self, columns: Iterable[int]) -> int:
        """``d·|S| - |N(S)|``: entries of the columns of ``S`` beyond the first in their row."""
        chosen = self.rows[list(columns)]
        return chosen.size - len(np.unique(chosen))


class GrowingSet:
    """A set of columns ``S``, and for every column how many of its rows lie in ``N(S)``.

    Attributes:
        hits: int32 ``(n,)``: ``|N(l) ∩ N(S)|``.
        members: ``S``, in the order they came.
        collisions: ``d·|S| - |N(S)|``.
    """

    def __init__(self, graph: Graph, columns: Iterable[int] = ()) -> None:
        self.graph = graph
        self.hits = np.zeros(graph.d_sae, dtype=np.int32)
        self.members: list[int] = []
        self.collisions = 0
        self._uses = np.zeros(graph.d_in, dtype=np.int64)  # columns of S on each row
        for column in columns:
            self.add(column)

    def add(self, column: int) -> None:
        rows = self.graph.rows[column]
        fresh = rows[self._uses[rows] == 0]
        self._uses[rows] += 1
        for row in fresh:
            self.hits[self.graph.columns_of(row)] += 1
        self.members.append(column)
        self.collisions += len(rows) - len(fresh)

    def remove(self, column: int) -> None:
        rows = self.graph.rows[column]
        self._uses[rows] -= 1
        gone = rows[self._uses[rows] == 0]
        for row in gone:
            self.hits[self.graph.columns_of(row)] -= 1
        self.members.remove(column)
        self.collisions -= len(rows) - len(gone)

    def best(self, tie_break: np.ndarray) -> int:
        """The column outside with the most rows in ``N(S)``; ties go to the larger ``tie_break`` (in ``[0, 1)``)."""
        score = self.hits + tie_break
        score[self.members] = -1.0
        return int(score.argmax())


def refuse_irregular(mask: Mask) -> None:
    """Raise unless every column uses ``degree`` rows.

    Raises:
        ValueError: a mask whose columns differ in degree.
    """
    if mask.held is not None:
        raise ValueError(
            "expansion, flatness and what follows from them (docs/theory.md D2, D4) are defined for masks whose "
            "columns all use `degree` rows; the columns of this mask differ in degree. Its coherence can be computed"
        )
