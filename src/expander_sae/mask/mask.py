"""Expander masks: which ``degree`` rows each column of the dictionary may use.

A mask is data (``rows``) plus, when it was drawn, the recipe that redraws it bit for bit. Stored SAEs keep the
recipe and the SHA-256 only, so the bit stream below is part of the file format: raw 64-bit words come from the
counter-based generator Philox4x64-10 (Salmon et al., SC 2011), the bounded draw and the shuffle are our own.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_HASH_HEADER = b"expander-sae mask v1\0"
_CHUNK_CELLS = 1 << 24  # working memory of a draw: at most this many bytes of a column-by-row table


@dataclass(frozen=True)
class MaskRecipe:
    """What redraws a mask: ``kind`` (a key of :data:`KINDS`), sizes and seed."""

    kind: str
    d_in: int
    d_sae: int
    degree: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Mask:
    """The support of every column: a left-``degree``-regular bipartite graph.

    Attributes:
        rows: int32 ``(d_sae, degree)``; ``rows[j]`` are the distinct rows of column ``j``, ascending.
        d_in: number of rows ``m`` of the dictionary.
        recipe: how it was drawn, or ``None`` for a learned or foreign mask.
    """

    rows: Tensor
    d_in: int
    recipe: MaskRecipe | None = None

    def __post_init__(self) -> None:
        check_rows(self.rows, self.d_in)

    @classmethod
    def build(cls, kind: str, *, d_in: int, d_sae: int, degree: int, seed: int = 0) -> Mask:
        """Draw a mask. The same arguments give the same bits on every machine and version.

        Args:
            kind: ``"left-regular"`` (every column's support uniform, columns independent; the paper's mask) or
                ``"balanced"`` (also right-regular: row degrees differ by at most one; THEORY A.3).
            d_in: rows ``m``.
            d_sae: columns ``n``.
            degree: rows a column uses, ``1 <= degree <= d_in``.
            seed: an integer in ``[0, 2**64)``.

        Raises:
            ValueError: unknown kind, or sizes out of range.
            TypeError: a size or the seed is not an integer.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown mask kind {kind!r}; choose one of {', '.join(map(repr, KINDS))}")
        # numpy integers become plain ones: the recipe is written as JSON.
        d_in, d_sae, degree, seed = (operator.index(number) for number in (d_in, d_sae, degree, seed))
        for name, value in (("d_in", d_in), ("d_sae", d_sae), ("degree", degree)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if degree > d_in:
            raise ValueError(f"degree {degree} exceeds d_in {d_in}: a column cannot use more rows than there are")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        recipe = MaskRecipe(kind, d_in, d_sae, degree, seed)
        return cls(torch.from_numpy(KINDS[kind](recipe)), d_in, recipe)

    @classmethod
    def from_rows(cls, rows: Tensor | np.ndarray, d_in: int) -> Mask:
        """A mask from a given ``(d_sae, degree)`` integer array (learned or foreign supports); sorted on the way."""
        rows = torch.as_tensor(rows)
        if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
            raise TypeError(f"rows must be integers, got {rows.dtype}")
        rows = rows.to(torch.int64)  # torch finds no minimum of its larger unsigned types
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= d_in):
            raise ValueError(f"rows must lie in [0, {d_in}), got [{int(rows.min())}, {int(rows.max())}]")
        return cls(rows.to(torch.int32).sort(dim=-1).values.contiguous(), d_in)

    @property
    def d_sae(self) -> int:
        """Number of columns ``n``."""
        return self.rows.shape[0]

    @property
    def degree(self) -> int:
        """Rows a column uses, ``d``."""
        return self.rows.shape[1]

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the sizes and the little-endian int32 rows."""
        digest = hashlib.sha256(_HASH_HEADER)
        digest.update(np.array([self.d_in, self.d_sae, self.degree], dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(self.rows.cpu().numpy(), dtype="<i4").tobytes())
        return digest.hexdigest()

    def row_degrees(self) -> Tensor:
        """int64 ``(d_in,)``: how many columns use each row."""
        return torch.bincount(self.rows.flatten().long(), minlength=self.d_in)

    def to_dense(self) -> Tensor:
        """bool ``(d_in, d_sae)``."""
        dense = torch.zeros(self.d_sae, self.d_in, dtype=torch.bool, device=self.rows.device)
        return dense.scatter_(1, self.rows.long(), True).T

    def __repr__(self) -> str:
        source = f"{self.recipe.kind}, seed {self.recipe.seed}" if self.recipe else "given rows"
        return f"Mask(d_in={self.d_in}, d_sae={self.d_sae}, degree={self.degree}, {source})"


def check_rows(rows: Tensor, d_in: int) -> None:
    """Raise unless ``rows`` is int32 ``(n, d)`` with ascending distinct entries in ``[0, d_in)``."""
    if rows.dtype != torch.int32 or rows.dim() != 2 or rows.shape[1] < 1:
        raise ValueError(f"rows must be int32 of shape (d_sae, degree), got {rows.dtype} {tuple(rows.shape)}")
    if rows.numel() == 0:
        raise ValueError("a mask needs at least one column")
    if int(rows.min()) < 0 or int(rows.max()) >= d_in:
        raise ValueError(f"rows must lie in [0, {d_in}), got [{int(rows.min())}, {int(rows.max())}]")
    bad = (rows[:, 1:] <= rows[:, :-1]).any(dim=1)
    if bool(bad.any()):
        column = int(bad.nonzero()[0])
        raise ValueError(
            f"the rows of column {column} are not distinct and ascending: {rows[column].tolist()}; "
            "Mask.from_rows sorts them, duplicates must be removed"
        )


def _words(seed: int, stream: int, count: int) -> np.ndarray:
    """``count`` raw uint64 words of one stream of Philox4x64-10 (key = seed, stream)."""
    return np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(count)


def _bounded(words: np.ndarray, bound: int) -> np.ndarray:
    """``floor(word * bound / 2**64)``: uniform on ``[0, bound)`` up to ``bound / 2**64``. ``bound < 2**31``."""
    high, low = words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)
    return (high * np.uint64(bound) + (low * np.uint64(bound) >> np.uint64(32))) >> np.uint64(32)


def _draw_left_regular(recipe: MaskRecipe) -> np.ndarray:
    """Floyd's sampling without replacement, all columns at once: uniform over the supports of size ``degree``."""
    m, n, d = recipe.d_in, recipe.d_sae, recipe.degree
    words = _words(recipe.seed, 0, n * d).reshape(n, d)
    rows = np.empty((n, d), dtype=np.int32)
    chunk = max(1, _CHUNK_CELLS // m)
    for start in range(0, n, chunk):
        part = words[start : start + chunk]
        column = np.arange(len(part))
        taken = np.zeros((len(part), m), dtype=bool)
        for t in range(d):
            last = m - d + t
            draw = _bounded(part[:, t], last + 1).astype(np.int32)
            draw[taken[column, draw]] = last  # `last` cannot be taken yet: earlier draws were below it
            taken[column, draw] = True
            rows[start : start + chunk, t] = draw
    rows.sort(axis=1)
    return rows


def _draw_balanced(recipe: MaskRecipe) -> np.ndarray:
    """Deal the columns from shuffled decks of all ``m`` rows, one deck after the other.

    A column that straddles two decks must not get a row twice: in the new deck the rows it already holds are
    moved behind the cards it takes. Every deck deals each row once, so row degrees differ by at most one.
    """
    m, n, d = recipe.d_in, recipe.d_sae, recipe.degree
    cards = np.empty(n * d, dtype=np.int32)
    for deck in range(-(-n * d // m)):
        order = np.argsort(_words(recipe.seed, 1 + deck, m), kind="stable").astype(np.int32)
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


KINDS: dict[str, Callable[[MaskRecipe], np.ndarray]] = {
    "left-regular": _draw_left_regular,
    "balanced": _draw_balanced,
}
"""Constructions by name; each returns int32 ``(n, d)``, ascending along the last axis."""
