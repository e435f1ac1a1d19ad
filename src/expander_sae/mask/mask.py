"""Expander masks: which ``degree`` rows each column of the dictionary may use.

A mask is data (``rows``) plus, when it was drawn, the recipe that redraws it bit for bit. Stored SAEs keep the
recipe and the SHA-256 only, so the draws are part of the file format (:mod:`expander_sae.mask.draws`).
"""

from __future__ import annotations

import hashlib
import operator
from dataclasses import asdict, dataclass, field
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from expander_sae.mask import structure
from expander_sae.mask.constructions import CONSTRUCTIONS
from expander_sae.registry import check_options

_HASH_HEADER = b"expander-sae mask v1\0"


@dataclass(frozen=True)
class MaskRecipe:
    """What redraws a mask: ``kind`` (of :data:`~expander_sae.mask.constructions.CONSTRUCTIONS`), sizes, seed, options.

    ``version`` is that of the construction: a recipe of another version is refused, it would draw other bits.
    """

    kind: str
    d_in: int
    d_sae: int
    degree: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    version: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Mask:
    """The support of every column: a left-``degree``-regular bipartite graph, or one padded to that.

    Attributes:
        rows: int32 ``(d_sae, degree)``; ``rows[j]`` are the distinct rows of column ``j``, ascending.
        d_in: number of rows ``m`` of the dictionary.
        recipe: how it was drawn, or ``None`` for a learned or foreign mask.
        held: bool ``(d_sae, degree)`` where columns differ in degree: which entries there are. The others are padding:
            real rows at which values are 0 for ever and that nothing counts. ``None`` where every entry is held.
    """

    rows: Tensor
    d_in: int
    recipe: MaskRecipe | None = None
    held: Tensor | None = None

    def __post_init__(self) -> None:
        check_rows(self.rows, self.d_in)
        if self.held is not None:
            check_held(self.held, self.rows)

    @classmethod
    def build(
        cls, kind: str, *, d_in: int, d_sae: int, degree: int, seed: int = 0, version: int | None = None, **options: Any
    ) -> Mask:
        """Draw a mask. The same arguments give the same bits on every machine.

        Args:
            kind: a name of :data:`~expander_sae.mask.constructions.CONSTRUCTIONS`, such as ``"left-regular"`` (the
                paper's) or ``"balanced"``.
            d_in: rows ``m``.
            d_sae: columns ``n``.
            degree: rows each column uses, on average where columns differ; ``1 <= degree <= d_in``.
            seed: an integer in ``[0, 2**64)``.
            version: of the construction, where a recipe names one; default: the one there is.
            options: of the construction.

        Raises:
            ValueError: unknown kind, option or version, or sizes out of range.
            TypeError: a size or the seed is not an integer.
        """
        construction = CONSTRUCTIONS[kind]
        check_options(f"mask kind {kind!r}", options, construction.options)
        if version not in (None, construction.version):
            raise ValueError(
                f"mask kind {kind!r} has version {construction.version} here, the recipe names version {version}: it "
                "would draw another mask; use the expander-sae that wrote it"
            )
        # numpy integers become plain ones: the recipe is written as JSON.
        d_in, d_sae, degree, seed = (operator.index(number) for number in (d_in, d_sae, degree, seed))
        for name, value in (("d_in", d_in), ("d_sae", d_sae), ("degree", degree)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if degree > d_in:
            raise ValueError(f"degree {degree} exceeds d_in {d_in}: a column cannot use more rows than there are")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        options = {name: _plain(option) for name, option in options.items()}
        recipe = MaskRecipe(kind, d_in, d_sae, degree, seed, options, construction.version)
        drawn = construction.draw(d_in, d_sae, degree, seed, **options)
        rows, held = drawn if isinstance(drawn, tuple) else (drawn, None)
        return cls(torch.from_numpy(rows), d_in, recipe, None if held is None or held.all() else torch.from_numpy(held))

    @classmethod
    def from_rows(cls, rows: Tensor | np.ndarray, d_in: int, held: Tensor | np.ndarray | None = None) -> Mask:
        """A mask from a given ``(d_sae, degree)`` integer array: learned or foreign supports.

        Columns of fewer rows are filled up with any others of their own, which a bool ``held (d_sae, degree)`` says are
        padding.

        The rows of each column must be ascending: sorting them here would part them from values that stand beside
        them. :func:`sort_entries` sorts both.

        Raises:
            ValueError: rows that are not distinct and ascending, or outside ``[0, d_in)``.
            TypeError: not integers.
        """
        held = None if held is None or bool(held.all()) else torch.as_tensor(held).contiguous()
        return cls(_integer_rows(rows, d_in).to(torch.int32).contiguous(), d_in, held=held)

    @classmethod
    def from_recipe(cls, recipe: MaskRecipe) -> Mask:
        """Redraw a mask. Raises as :meth:`build`."""
        sizes = {name: value for name, value in recipe.to_dict().items() if name not in ("kind", "options")}
        return cls.build(recipe.kind, **sizes, **recipe.options)

    @property
    def d_sae(self) -> int:
        """Number of columns ``n``."""
        return self.rows.shape[0]

    @property
    def degree(self) -> int:
        """Entries of each column, ``d``; where columns differ, those of the fullest."""
        return self.rows.shape[1]

    @property
    def counts(self) -> Tensor:
        """int64 ``(d_sae,)``: rows that each column uses."""
        return self._held().sum(dim=1)

    @property
    def num_entries(self) -> int:
        """Rows that all columns use, together."""
        return self.rows.numel() if self.held is None else int(self.held.sum())

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the sizes and the little-endian int32 rows; then of ``held``, a byte each, if there is one."""
        digest = hashlib.sha256(_HASH_HEADER)
        digest.update(np.array([self.d_in, self.d_sae, self.degree], dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(self.rows.cpu().numpy(), dtype="<i4").tobytes())
        if self.held is not None:
            digest.update(self.held.cpu().numpy().tobytes())
        return digest.hexdigest()

    def row_degrees(self) -> Tensor:
        """int64 ``(d_in,)``: how many columns use each row."""
        return torch.bincount(self.rows[self._held()].long(), minlength=self.d_in)

    def overlap(self) -> structure.Overlap:
        """How many rows two columns share, over all pairs."""
        return structure.overlap(self.rows, self._held(), self.d_in)

    def four_cycles(self) -> int:
        """Cycles of length 4 in the bipartite graph: two columns and two rows that both use."""
        return self.overlap().four_cycles

    def girth(self) -> int | None:
        """Length of the shortest cycle in the bipartite graph; ``None`` if it has none."""
        return structure.girth(self.rows, self._held(), self.d_in)

    def coverage(self, indices: Tensor) -> Tensor:
        """How many rows a set of columns uses together, for each sample.

        Args:
            indices: integer ``(B, k)``, the columns; a negative index names none.

        Returns:
            int64 ``(B,)``.

        Raises:
            ValueError: another shape, or a column that does not exist.
        """
        if indices.dim() != 2 or (indices.numel() and int(indices.max()) >= self.d_sae):
            raise ValueError(f"indices must be (B, k) of columns below {self.d_sae}, got shape {tuple(indices.shape)}")
        return structure.coverage(self.rows, self._held(), self.d_in, indices)

    def to_dense(self) -> Tensor:
        """bool ``(d_in, d_sae)``."""
        dense = torch.zeros(self.d_sae, self.d_in, dtype=torch.bool, device=self.rows.device)
        return dense.scatter_(1, self.rows.long(), self._held()).T

    def _held(self) -> Tensor:
        return torch.ones_like(self.rows, dtype=torch.bool) if self.held is None else self.held

    def __repr__(self) -> str:
        source = f"{self.recipe.kind}, seed {self.recipe.seed}" if self.recipe else "given rows"
        degree = f"degree={self.degree}" if self.held is None else f"degree<={self.degree}"
        return f"Mask(d_in={self.d_in}, d_sae={self.d_sae}, {degree}, {source})"


@overload
def sort_entries(rows: Tensor | np.ndarray, values: None = None) -> Tensor: ...
@overload
def sort_entries(rows: Tensor | np.ndarray, values: Tensor) -> tuple[Tensor, Tensor]: ...
def sort_entries(rows: Tensor | np.ndarray, values: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """``rows (n, d)`` ascending in each column, and ``values (n, d)`` in the same order if given.

    Raises:
        ValueError: values of another shape.
    """
    order = torch.as_tensor(rows).to(torch.int64).sort(dim=-1)
    if values is None:
        return order.values.to(torch.int32)
    if values.shape != order.values.shape:
        raise ValueError(f"values {tuple(values.shape)} and rows {tuple(order.values.shape)} must have one shape")
    return order.values.to(torch.int32), values.gather(-1, order.indices.to(values.device))


def _plain(option: Any) -> Any:
    """As JSON has it: the recipe is written as that."""
    if isinstance(option, Tensor | np.ndarray | np.generic):
        return option.tolist()
    return list(option) if isinstance(option, tuple) else option


def _integer_rows(rows: Tensor | np.ndarray, d_in: int) -> Tensor:
    rows = torch.as_tensor(rows)
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise TypeError(f"rows must be integers, got {rows.dtype}")
    rows = rows.to(torch.int64)  # torch finds no minimum of its larger unsigned types, and int32 would wrap round
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= d_in):
        raise ValueError(f"rows must lie in [0, {d_in}), got [{int(rows.min())}, {int(rows.max())}]")
    return rows


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
            "sort_entries(rows, values) sorts them together with their values, duplicates must be removed"
        )


def check_held(held: Tensor, rows: Tensor) -> None:
    """Raise unless ``held`` is bool, of the shape of ``rows``, with an entry in every column."""
    if held.dtype != torch.bool or held.shape != rows.shape:
        raise ValueError(
            f"held must be bool of the rows' shape {tuple(rows.shape)}, got {held.dtype} {tuple(held.shape)}"
        )
    if not bool(held.any(dim=1).all()):
        raise ValueError(
            f"column {int((~held.any(dim=1)).nonzero()[0])} holds no entry: every column needs at least one"
        )
