"""Dictionaries: the modules that own the learned columns, hand out their matrix and count their storage.

Encoders and pursuits see the :class:`~expander_sae.dictionary.matrix.Matrix` only. A new kind of dictionary is a
subclass here or in a plug-in, its matrix, and its entry in :data:`DICTIONARIES`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from expander_sae.dictionary.basis import STANDARD, Basis, RotatedMatrix, basis_from
from expander_sae.dictionary.matrix import DenseMatrix, ExpanderMatrix, Matrix
from expander_sae.dictionary.unit import SMALLEST_NORM, unit_rows
from expander_sae.mask import Mask, MaskRecipe, check_held, check_rows
from expander_sae.registry import Registry
from expander_sae.stored import Section, take_tensor

EXPLICIT = "explicit"  # in the place of a mask kind: the supports are stored
_PLAIN_STORAGE = {"kind": "plain", "version": 1}  # values as a tensor of their own type; reserved for others


class Dictionary(nn.Module):
    """The learned columns of an SAE.

    Args:
        values: one floating-point row for each feature.
        unit_norm: normalise columns in the forward pass, as the paper does.
        held: bool in the shape of ``values``: which of them there are, if not all. The others are padding: 0, without a
            gradient, not counted and not stored.

    Attributes:
        basis: what the columns are written in; ``None`` for the model's own coordinates.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    d_in: int
    degree: int | None = None
    """Rows each column uses, if that is fewer than all."""

    def __init__(self, values: Tensor, *, unit_norm: bool, held: Tensor | None = None) -> None:
        super().__init__()
        self.unit_norm = unit_norm
        self.held: Tensor | None
        self.register_buffer("held", held)
        self.values = nn.Parameter((values if held is None else values.masked_fill(~held, 0)).contiguous())
        self.basis: Basis | None = None

    def core(self) -> Matrix:
        """The map without the basis, with unit-norm columns if ``unit_norm``."""
        raise NotImplementedError

    @property
    def mask(self) -> Mask | None:
        """The supports, if not every column may use all rows."""
        return None

    def matrix(self) -> Matrix:
        """The map ``W``. Hold it while parameters stand still: it is made anew."""
        core = self.core()
        return core if self.basis is None else RotatedMatrix(core, self.basis)

    def coordinates(self, h: Tensor) -> Tensor:
        """``h (..., m)`` in the basis."""
        return h if self.basis is None else self.basis.coordinates(h)

    def vectors(self, y: Tensor) -> Tensor:
        """Back from coordinates in the basis ``(..., m)``."""
        return y if self.basis is None else self.basis.vectors(y)

    @property
    def basis_values(self) -> int:
        """Stored values of the basis."""
        return 0 if self.basis is None else self.basis.num_values

    @property
    def d_sae(self) -> int:
        return self.values.shape[0]

    @property
    def num_values(self) -> int:
        """Learned values: ``d·n`` on an expander, ``m·n`` dense."""
        return self.values.numel() if self.held is None else int(self.held.sum())

    @property
    def support_bytes(self) -> int:
        """Bytes that name the supports: 0 when a recipe redraws them or there are none."""
        return 0

    @property
    def num_bytes(self) -> int:
        """Bytes on disk: values in their own type, supports and basis."""
        basis = () if self.basis is None else self.basis.stored_tensors().values()
        own = self.num_values * self.values.element_size() + self.support_bytes
        return own + sum(tensor.numel() * tensor.element_size() for tensor in basis)

    def to_dense(self) -> Tensor:
        """``W`` as ``(m, n)``, detached."""
        return self.matrix().detach().to_dense()

    def config(self) -> dict[str, Any]:
        """The section of ``config.json`` that, with :meth:`stored_tensors`, rebuilds the dictionary."""
        storage = _PLAIN_STORAGE | {"dtype": str(self.values.dtype).removeprefix("torch.")}
        return {
            "kind": self.kind,
            "version": self.version,
            "unit_norm": self.unit_norm,
            "basis": dict(STANDARD) if self.basis is None else self.basis.config(),
            "storage": storage,
        }

    def stored_tensors(self) -> dict[str, Tensor]:
        """What goes to disk."""
        values = self.values.detach()
        basis = {} if self.basis is None else self.basis.stored_tensors()
        named = {f"basis.{name}": tensor for name, tensor in basis.items()}
        return {"values": values if self.held is None else values[self.held]} | named

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], d_in: int, d_sae: int) -> Self:
        """Rebuild from :meth:`config` and :meth:`stored_tensors`.

        Raises:
            ValueError: an entry or tensor that is missing, of another type or size, or not the one recorded.
        """
        raise NotImplementedError

    @torch.no_grad()
    def point_at(self, features: Tensor, targets: Tensor, norm: float = 1.0) -> None:
        """Set the values of ``features (f,)`` to ``targets (f, m)`` restricted to their supports, at norm ``norm``.

        With ``unit_norm`` the norm of the values does not show in the columns, but a smaller one makes the optimiser's
        steps turn them faster. A target that vanishes on a column's support leaves that column alone.
        """
        new = self.restrict(features, self.coordinates(targets.to(self.values.dtype)))
        norms = new.norm(dim=1, keepdim=True)
        unit = new / norms.clamp_min(SMALLEST_NORM)
        pointed = unit if norm == 1.0 else unit * norm
        self.values[features] = torch.where(norms > SMALLEST_NORM, pointed, self.values[features])

    def restrict(self, features: Tensor, targets: Tensor) -> Tensor:
        """Dense columns ``targets (f, m)``, in the basis, as values of ``features``: what lies on their supports."""
        raise NotImplementedError


class ExpanderDictionary(Dictionary):
    """Columns on a mask: ``d·n`` learned values.

    The supports are state: the buffer ``rows`` is their one copy, in ``state_dict`` together with the recipe that
    redraws them, so that values are never read on another mask than their own.

    Args:
        mask: the supports.
        values: ``(n, d)``, initial values; default independent Gaussian entries, so that each column's direction
            is uniform on its support.
        unit_norm: normalise columns in the forward pass.
        generator: for the default initialisation.
    """

    kind = "expander"

    def __init__(
        self,
        mask: Mask,
        values: Tensor | None = None,
        *,
        unit_norm: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if values is None:
            length = mask.degree**-0.5 if mask.held is None else mask.counts.unsqueeze(1) ** -0.5
            values = torch.randn(mask.rows.shape, generator=generator).mul_(length)
        if values.shape != mask.rows.shape:
            raise ValueError(f"values must have the mask's shape {tuple(mask.rows.shape)}, got {tuple(values.shape)}")
        super().__init__(values, unit_norm=unit_norm, held=mask.held)
        self.d_in = mask.d_in
        self.recipe = mask.recipe
        self.rows: Tensor
        self.register_buffer("rows", mask.rows)

    def core(self) -> ExpanderMatrix:
        values = self.values if self.held is None else self.values.masked_fill(~self.held, 0)  # no gradient to padding
        return ExpanderMatrix(self.rows, unit_rows(values) if self.unit_norm else values, self.d_in, self.held)

    @property
    def mask(self) -> Mask:
        """The supports as they are now."""
        return Mask(self.rows, self.d_in, self.recipe, self.held)

    @property
    def degree(self) -> int:  # type: ignore[override]
        return self.rows.shape[1]

    @property
    def support_bytes(self) -> int:
        if self.recipe:
            return 0
        return self.rows.numel() * smallest_unsigned(self.d_in).itemsize + (
            0 if self.held is None else self.rows.numel()
        )

    @torch.no_grad()
    def move(self, features: Tensor, rows: Tensor, values: Tensor, held: Tensor | None = None) -> None:
        """Give ``features (f,)`` other supports ``rows (f, d)``, in any order, with their ``values (f, d)``.

        From then on the supports are stored: no recipe redraws them. ``held``, bool ``(f, d)``, says which of the
        entries there are, if not all: the others are padding.

        Raises:
            ValueError: rows that repeat or lie outside ``[0, d_in)``, or shapes that do not fit.
        """
        if values.shape != rows.shape:
            raise ValueError(f"values {tuple(values.shape)} and rows {tuple(rows.shape)} must have one shape")
        rows, order = rows.to(self.rows.device, torch.int64).sort(dim=1)
        rows, values = rows.to(torch.int32), values.to(self.values).gather(1, order)
        check_rows(rows, self.d_in)
        if held is not None or self.held is not None:
            held = torch.ones_like(rows, dtype=torch.bool) if held is None else held.to(rows.device).gather(1, order)
            check_held(held, rows)
            whole = torch.ones_like(self.rows, dtype=torch.bool) if self.held is None else self.held.clone()
            whole[features] = held
            self.held, values = whole, values.masked_fill(~held, 0)
        moved = self.rows.clone()  # a mask that shares the old rows keeps them
        moved[features] = rows
        self.rows, self.recipe = moved, None
        self.values[features] = values

    def get_extra_state(self) -> Tensor:
        """Width and recipe as JSON bytes: a tensor, so that checkpoints without pickles can keep it."""
        state = {"d_in": self.d_in, "recipe": self.recipe.to_dict() if self.recipe else None}
        return torch.frombuffer(bytearray(json.dumps(state, sort_keys=True).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        recipe = _read_extra(state)["recipe"]
        self.recipe = MaskRecipe(**recipe) if recipe else None

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **named: Any) -> None:
        extra, rows = state_dict.get(f"{prefix}_extra_state"), state_dict.get(f"{prefix}rows")
        if extra is not None and (width := _read_extra(extra)["d_in"]) != self.d_in:
            raise ValueError(f"the state is of a dictionary with d_in = {width}, this one has d_in = {self.d_in}")
        if rows is not None:
            check_rows(rows, self.d_in)
            self.rows = self.rows.clone()  # copied into below; a mask that shares the old rows keeps them
            held = state_dict.get(f"{prefix}held")
            if held is not None:
                check_held(held, rows)
            self.held = None if held is None else held.to(self.rows.device, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def config(self) -> dict[str, Any]:
        sizes = {"d_in": self.d_in, "d_sae": self.d_sae, "degree": self.degree}
        mask = self.recipe.to_dict() if self.recipe else {"kind": EXPLICIT, "version": 1} | sizes
        return super().config() | {"mask": mask | {"sha256": self.mask.sha256}}

    def stored_tensors(self) -> dict[str, Tensor]:
        supports = {} if self.recipe else {"rows": self.rows.to(smallest_unsigned(self.d_in))}
        if self.held is not None and not self.recipe:
            supports["held"] = self.held
        return super().stored_tensors() | supports

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], d_in: int, d_sae: int) -> Self:
        unit_norm = _common(section, "mask")
        recorded = section.section("mask")
        degree = recorded.integer("degree", 1, d_in)
        sizes = (recorded.integer("d_in"), recorded.integer("d_sae"))
        if sizes != (d_in, d_sae):
            raise ValueError(f"the mask is {sizes[0]} x {sizes[1]}, the SAE {d_in} x {d_sae}")
        _check_values(tensors, d_in, d_sae, degree)  # first: no mask is drawn that the values do not fit
        if recorded.text("kind") == EXPLICIT:
            recorded.version(1)
            rows, held = _stored_rows(tensors, (d_sae, degree))
            mask = Mask.from_rows(rows, d_in, held)
        else:
            options, seed = recorded.mapping("options"), recorded.integer("seed", 0, 2**64 - 1)
            recipe = MaskRecipe(
                recorded.text("kind"), d_in, d_sae, degree, seed, options, version=recorded.integer("version")
            )
            mask = Mask.from_recipe(recipe)
        if mask.sha256 != recorded.text("sha256"):
            raise ValueError(
                f"the mask does not match the one the SAE was trained on: its hash is {mask.sha256}, the config "
                f"records {recorded.text('sha256')}. The recipe or the stored supports were changed."
            )
        if mask.held is None:
            return cls(mask, take_tensor(tensors, "values", (d_sae, degree)), unit_norm=unit_norm)
        packed = take_tensor(tensors, "values", (mask.num_entries,))
        values = packed.new_zeros(mask.rows.shape)
        values[mask.held] = packed
        return cls(mask, values, unit_norm=unit_norm)

    def restrict(self, features: Tensor, targets: Tensor) -> Tensor:
        values = targets.gather(1, self.rows[features].long())
        return values if self.held is None else values.masked_fill(~self.held[features], 0)

    def extra_repr(self) -> str:
        return f"{self.mask}, unit_norm={self.unit_norm}"


class DenseDictionary(Dictionary):
    """Columns without a mask: ``m·n`` learned values, ``values (n, m)``."""

    kind = "dense"

    def __init__(self, values: Tensor, *, unit_norm: bool = True) -> None:
        if values.dim() != 2:
            raise ValueError(f"values must have shape (d_sae, d_in), got {tuple(values.shape)}")
        super().__init__(values, unit_norm=unit_norm)
        self.d_in = values.shape[1]

    @classmethod
    def random(
        cls, d_in: int, d_sae: int, *, unit_norm: bool = True, generator: torch.Generator | None = None
    ) -> DenseDictionary:
        """Columns uniform on the sphere."""
        return cls(unit_rows(torch.randn(d_sae, d_in, generator=generator)), unit_norm=unit_norm)

    def core(self) -> DenseMatrix:
        return DenseMatrix(unit_rows(self.values) if self.unit_norm else self.values)

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], d_in: int, d_sae: int) -> Self:
        unit_norm = _common(section)
        return cls(take_tensor(tensors, "values", (d_sae, d_in)), unit_norm=unit_norm)

    def restrict(self, features: Tensor, targets: Tensor) -> Tensor:
        return targets

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}, unit_norm={self.unit_norm}"


DICTIONARIES: Registry[type[Dictionary]] = Registry("dictionary kind")
"""Dictionaries by kind."""
DICTIONARIES.add("expander", ExpanderDictionary)
DICTIONARIES.add("dense", DenseDictionary)


def smallest_unsigned(bound: int) -> torch.dtype:
    """The smallest unsigned type that holds ``bound - 1``."""
    return torch.uint8 if bound <= 1 << 8 else torch.uint16 if bound <= 1 << 16 else torch.uint32


def dictionary_from(section: Section, tensors: Mapping[str, Tensor], d_in: int, d_sae: int) -> Dictionary:
    """Rebuild a dictionary of any registered kind. Raises ``ValueError`` as :meth:`Dictionary.from_config`."""
    dictionary = section.kind(DICTIONARIES).from_config(section, tensors, d_in, d_sae)
    dictionary.basis = basis_from(section.section("basis"), tensors, d_in)
    return dictionary


def _common(section: Section, *more: str) -> bool:
    """Check what every dictionary's section has; returns ``unit_norm``."""
    section.only("kind", "version", "unit_norm", "basis", "storage", *more)
    part = section.section("storage")
    if part.text("kind") != _PLAIN_STORAGE["kind"]:
        raise ValueError(f"{part.name} has kind {part.text('kind')!r}, this program knows 'plain' only")
    part.version(1)
    return section.boolean("unit_norm")


def _check_values(tensors: Mapping[str, Tensor], d_in: int, d_sae: int, degree: int) -> None:
    """Refuse values that are neither ``(d_sae, degree)`` nor, without padding, in one row."""
    values = tensors.get("values")
    if values is None or values.dim() != 1:
        take_tensor(tensors, "values", (d_sae, degree))
    elif not d_sae <= len(values) <= d_sae * d_in:
        raise ValueError(f"the tensor 'values' has {len(values)} entries for {d_sae} columns of 1 to {d_in} rows")


def _stored_rows(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    if "rows" not in tensors:
        raise ValueError("the tensor 'rows' is missing: the supports of this dictionary are stored, not drawn")
    for name in ("rows", "held"):
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"the tensor {name!r} should have shape {shape}, it has {tuple(tensors[name].shape)}")
    return tensors["rows"].to(torch.int64), tensors.get("held")


def _read_extra(state: Tensor) -> dict[str, Any]:
    return json.loads(bytes(state.cpu().tolist()))
