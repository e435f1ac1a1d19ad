"""Dictionaries: what stores the columns ``W``, and the linear map they define.

A *matrix* (:class:`ExpanderMatrix`, :class:`DenseMatrix`) is the map held still: correlate, combine, Gram entries,
selection. A *dictionary* (:class:`ExpanderDictionary`, :class:`DenseDictionary`) is an ``nn.Module`` that owns the
learned values, hands out its matrix and counts its storage. Encoders and pursuits see matrices only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expander_sae import ops
from expander_sae.mask import Mask
from expander_sae.ops import SparseCode, dense

_SMALLEST_NORM = 1e-12  # a zero column stays zero instead of turning into NaN


class Matrix(Protocol):
    """``W`` of shape ``(m, n)`` = ``(d_in, d_sae)``, held still; differentiable. ``B`` is any batch shape."""

    @property
    def d_in(self) -> int: ...
    @property
    def d_sae(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    def correlate(self, h: Tensor) -> Tensor:
        """``Wᵀh``: ``(B, m)`` to ``(B, n)``."""
        ...

    def topk(
        self, h: Tensor, b_enc: Tensor | None, k: int, *, relu: bool = False, magnitude: bool = False
    ) -> SparseCode:
        """The ``k`` largest entries of ``Wᵀh + b_enc``; ties to the lower index."""
        ...

    def decode(self, code: SparseCode) -> Tensor:
        """``Wx``: ``(B, m)``."""
        ...

    def correlate_at(self, h: Tensor, indices: Tensor) -> Tensor:
        """Entries of ``Wᵀh`` at ``indices (B, k)``."""
        ...

    def gram(self, indices: Tensor) -> Tensor:
        """``W_SᵀW_S`` for each support: ``(B, k)`` to ``(B, k, k)``."""
        ...

    def columns(self, indices: Tensor) -> Tensor:
        """Dense columns: ``(...)`` integer to ``(..., m)``."""
        ...

    def norms(self) -> Tensor:
        """Column norms ``(n,)``."""
        ...

    def subset(self, features: Tensor) -> Self:
        """The matrix of the named columns, in that order."""
        ...

    def detach(self) -> Self:
        """The same matrix outside the autograd graph."""
        ...

    def to_dense(self) -> Tensor:
        """``(m, n)``."""
        ...


@dataclass(frozen=True)
class ExpanderMatrix:
    """``W[rows[j, t], j] = values[j, t]``: ``d`` entries a column, ``Wᵀh`` in ``d·n`` multiplications."""

    rows: Tensor
    values: Tensor
    d_in: int

    @property
    def d_sae(self) -> int:
        return self.rows.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def correlate(self, h: Tensor) -> Tensor:
        return ops.correlate(h, self.rows, self.values, m=self.d_in)

    def topk(
        self, h: Tensor, b_enc: Tensor | None, k: int, *, relu: bool = False, magnitude: bool = False
    ) -> SparseCode:
        return ops.encode_topk(h, self.rows, self.values, b_enc, k, relu=relu, magnitude=magnitude, m=self.d_in)

    def decode(self, code: SparseCode) -> Tensor:
        return ops.decode(code, self.rows, self.values, self.d_in)

    def correlate_at(self, h: Tensor, indices: Tensor) -> Tensor:
        return ops.correlate_at(h, indices, self.rows, self.values, m=self.d_in)

    def gram(self, indices: Tensor) -> Tensor:
        return ops.gram(indices, self.rows, self.values)

    def columns(self, indices: Tensor) -> Tensor:
        picked = indices.long()
        out = self.values.new_zeros(*indices.shape, self.d_in)
        return out.scatter(-1, self.rows[picked].long(), self.values[picked])

    def norms(self) -> Tensor:
        return self.values.norm(dim=1)

    def subset(self, features: Tensor) -> Self:
        return replace(self, rows=self.rows[features], values=self.values[features])

    def detach(self) -> Self:
        return replace(self, values=self.values.detach())

    def to_dense(self) -> Tensor:
        return self.columns(torch.arange(self.d_sae, device=self.device)).T


@dataclass(frozen=True)
class DenseMatrix:
    """``W = weightᵀ`` with ``weight (n, m)``: a feature's column is one contiguous row in memory."""

    weight: Tensor

    @property
    def d_in(self) -> int:
        return self.weight.shape[1]

    @property
    def d_sae(self) -> int:
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def correlate(self, h: Tensor) -> Tensor:
        return F.linear(self._fitting(h), self.weight)

    def topk(
        self, h: Tensor, b_enc: Tensor | None, k: int, *, relu: bool = False, magnitude: bool = False
    ) -> SparseCode:
        if not 1 <= k <= self.d_sae:
            raise ValueError(f"k must be between 1 and d_sae = {self.d_sae}, got {k}")
        indices, values = dense.encode_topk(
            self._fitting(h).reshape(-1, self.d_in), self.weight, b_enc, k, relu, magnitude
        )
        return SparseCode(indices, values).reshape(*h.shape[:-1])

    def decode(self, code: SparseCode) -> Tensor:
        flat = code.reshape(-1)
        return dense.decode(flat.indices, flat.values, self.weight).reshape(*code.batch_shape, self.d_in)

    def correlate_at(self, h: Tensor, indices: Tensor) -> Tensor:
        flat = indices.reshape(-1, indices.shape[-1])
        return dense.correlate_at(self._fitting(h).reshape(-1, self.d_in), flat, self.weight).reshape(indices.shape)

    def gram(self, indices: Tensor) -> Tensor:
        columns = self.columns(indices)
        return columns @ columns.mT

    def columns(self, indices: Tensor) -> Tensor:
        return self.weight[indices.long()]

    def norms(self) -> Tensor:
        return self.weight.norm(dim=1)

    def subset(self, features: Tensor) -> Self:
        return replace(self, weight=self.weight[features])

    def detach(self) -> Self:
        return replace(self, weight=self.weight.detach())

    def to_dense(self) -> Tensor:
        return self.weight.T

    def _fitting(self, h: Tensor) -> Tensor:
        if h.shape[-1] != self.d_in:
            raise ValueError(f"activations have width {h.shape[-1]}, the dictionary has d_in = {self.d_in}")
        return h


class Dictionary(nn.Module):
    """The learned columns of an SAE. ``unit_norm`` normalises them in the forward pass, as the paper does."""

    unit_norm: bool
    kind: str

    def matrix(self) -> Matrix:
        """The map, with unit-norm columns if ``unit_norm``. Hold it while parameters stand still: it is made anew."""
        raise NotImplementedError

    @property
    def parameter(self) -> nn.Parameter:
        """The learned values, one feature a row."""
        raise NotImplementedError

    @property
    def d_in(self) -> int:
        raise NotImplementedError

    @property
    def d_sae(self) -> int:
        return self.parameter.shape[0]

    @property
    def num_values(self) -> int:
        """Learned values: ``d·n`` on an expander, ``m·n`` dense."""
        return self.parameter.numel()

    @property
    def support_bytes(self) -> int:
        """Bytes that name the supports: 0 when a recipe redraws them or there are none."""
        return 0

    @property
    def num_bytes(self) -> int:
        """Bytes on disk: values in the parameter's type, plus supports."""
        return self.num_values * self.parameter.element_size() + self.support_bytes

    def to_dense(self) -> Tensor:
        """``W`` as ``(m, n)``, detached."""
        return self.matrix().detach().to_dense()

    def config(self) -> dict[str, Any]:
        """What, with :meth:`stored_tensors`, rebuilds the dictionary."""
        return {"kind": self.kind, "unit_norm": self.unit_norm}

    def stored_tensors(self) -> dict[str, Tensor]:
        """What goes to disk."""
        raise NotImplementedError

    @torch.no_grad()
    def point_at(self, features: Tensor, targets: Tensor) -> None:
        """Set the columns of ``features (f,)`` to ``targets (f, m)`` restricted to their supports, at unit norm.

        A target that vanishes on a column's support leaves that column alone.
        """
        new = self._restrict(features, targets.to(self.parameter.dtype))
        norms = new.norm(dim=1, keepdim=True)
        old = self.parameter[features]
        self.parameter[features] = torch.where(norms > _SMALLEST_NORM, new / norms.clamp_min(_SMALLEST_NORM), old)

    def _restrict(self, features: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError


class ExpanderDictionary(Dictionary):
    """Columns on a fixed mask: ``d·n`` learned values.

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
        super().__init__()
        if values is None:
            values = torch.randn(mask.rows.shape, generator=generator).mul_(mask.degree**-0.5)
        if values.shape != mask.rows.shape:
            raise ValueError(f"values must have the mask's shape {tuple(mask.rows.shape)}, got {tuple(values.shape)}")
        self.mask = mask
        self.unit_norm = unit_norm
        self.values = nn.Parameter(values.contiguous())
        self.register_buffer("rows", mask.rows, persistent=False)
        self.rows: Tensor

    def matrix(self) -> ExpanderMatrix:
        values = unit_rows(self.values) if self.unit_norm else self.values
        return ExpanderMatrix(self.rows, values, self.mask.d_in)

    @property
    def parameter(self) -> nn.Parameter:
        return self.values

    @property
    def d_in(self) -> int:
        return self.mask.d_in

    @property
    def degree(self) -> int:
        return self.mask.degree

    @property
    def support_bytes(self) -> int:
        return 0 if self.mask.recipe else self.mask.rows.numel() * smallest_unsigned(self.d_in).itemsize

    def config(self) -> dict[str, Any]:
        recipe = self.mask.recipe.to_dict() if self.mask.recipe else None
        return super().config() | {"degree": self.degree, "mask": {"recipe": recipe, "sha256": self.mask.sha256}}

    def stored_tensors(self) -> dict[str, Tensor]:
        tensors = {"values": self.values.detach()}
        if self.mask.recipe is None:
            tensors["rows"] = self.rows.to(smallest_unsigned(self.d_in))
        return tensors

    def _restrict(self, features: Tensor, targets: Tensor) -> Tensor:
        return targets.gather(1, self.rows[features].long())

    def extra_repr(self) -> str:
        return f"{self.mask}, unit_norm={self.unit_norm}"


class DenseDictionary(Dictionary):
    """Columns without a mask: ``m·n`` learned values, ``weight (n, m)``."""

    kind = "dense"

    def __init__(self, weight: Tensor, *, unit_norm: bool = True) -> None:
        super().__init__()
        if weight.dim() != 2:
            raise ValueError(f"weight must have shape (d_sae, d_in), got {tuple(weight.shape)}")
        self.unit_norm = unit_norm
        self.weight = nn.Parameter(weight.contiguous())

    @classmethod
    def random(
        cls, d_in: int, d_sae: int, *, unit_norm: bool = True, generator: torch.Generator | None = None
    ) -> DenseDictionary:
        """Columns uniform on the sphere."""
        return cls(unit_rows(torch.randn(d_sae, d_in, generator=generator)), unit_norm=unit_norm)

    def matrix(self) -> DenseMatrix:
        return DenseMatrix(unit_rows(self.weight) if self.unit_norm else self.weight)

    @property
    def parameter(self) -> nn.Parameter:
        return self.weight

    @property
    def d_in(self) -> int:
        return self.weight.shape[1]

    def stored_tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach()}

    def _restrict(self, features: Tensor, targets: Tensor) -> Tensor:
        return targets

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}, unit_norm={self.unit_norm}"


class _UnitRows(torch.autograd.Function):
    """``F.normalize`` in fewer passes over memory: forward and backward take .4 of its time at a million features."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        norms = torch.linalg.vector_norm(values, dim=1, keepdim=True).clamp_min_(_SMALLEST_NORM)
        unit = values / norms
        ctx.save_for_backward(unit, norms)
        ctx.set_materialize_grads(False)
        return unit, norms

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_norms: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        # The norms are an output as well, so that the gradient of this gradient is right; else nobody asks for theirs.
        unit, norms = ctx.saved_tensors
        through_norms = None if grad_norms is None else grad_norms * unit
        if grad is None:
            return through_norms
        along = (unit * grad).sum(dim=1, keepdim=True)
        through_unit = torch.addcmul(grad, unit, along, value=-1) / norms
        return through_unit if through_norms is None else through_unit + through_norms


def unit_rows(values: Tensor) -> Tensor:
    """Rows at unit norm; a zero row stays zero."""
    if values.dtype == torch.float16:  # the smallest norm would be 0 in it
        return unit_rows(values.float()).half()
    return _UnitRows.apply(values)[0]  # type: ignore[index]


def smallest_unsigned(bound: int) -> torch.dtype:
    """The smallest unsigned type that holds ``bound - 1``."""
    return torch.uint8 if bound <= 1 << 8 else torch.uint16 if bound <= 1 << 16 else torch.uint32


def dictionary_from(config: dict[str, Any], tensors: dict[str, Tensor], d_in: int) -> Dictionary:
    """Rebuild a dictionary from :meth:`Dictionary.config` and :meth:`Dictionary.stored_tensors`.

    Raises:
        ValueError: unknown kind, a missing tensor, or a mask whose hash is not the recorded one (both are named).
    """
    kind, unit_norm = config["kind"], config["unit_norm"]
    try:
        if kind == "dense":
            return DenseDictionary(tensors["weight"], unit_norm=unit_norm)
        if kind != "expander":
            raise ValueError(f"unknown dictionary kind {kind!r}; this version knows 'expander' and 'dense'")
        recipe = config["mask"]["recipe"]
        mask = Mask.build(**recipe) if recipe else Mask.from_rows(tensors["rows"].to(torch.int64), d_in)
        if mask.sha256 != config["mask"]["sha256"]:
            raise ValueError(
                f"the mask does not match the one the SAE was trained on: its hash is {mask.sha256}, the config "
                f"records {config['mask']['sha256']}. The recipe or the stored supports were changed."
            )
        return ExpanderDictionary(mask, tensors["values"], unit_norm=unit_norm)
    except KeyError as missing:
        raise ValueError(f"the {kind} dictionary lacks {missing}") from None
