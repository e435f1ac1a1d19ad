"""Matrices: the map ``W`` of a dictionary held still. Encoders, pursuits and theory see these only.

A third kind of matrix is a subclass of :class:`Matrix` beside the dictionary that hands it out; nothing else asks for
its type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from expander_sae import ops
from expander_sae.mask import check_rows, sort_entries
from expander_sae.ops import Selection, SparseCode, dense
from expander_sae.ops.fused import TiedError, tied_error


class Matrix(ABC):
    """``W`` of shape ``(m, n)`` = ``(d_in, d_sae)``; differentiable. ``B`` is any batch shape.

    Attributes:
        values: one floating-point row for each feature: what is learned and stored of it.
        d_in: ``m``.
    """

    values: Tensor
    d_in: int

    @property
    def d_sae(self) -> int:
        return self.values.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def support(self) -> Tensor | None:
        """int32 ``(n, d)``, the rows each column uses; ``None`` where every column may use all."""
        return None

    def matrix(self) -> Self:
        """Itself: whoever takes a dictionary takes its matrix as well."""
        return self

    @property
    def core(self) -> Matrix:
        """``A`` of ``W = R·A``: what acts on :meth:`coordinates`. Itself where there is no basis."""
        return self

    def coordinates(self, h: Tensor) -> Tensor:
        """``Rᵀh``: activations ``(B, m)`` as :attr:`core` sees them."""
        return h

    @abstractmethod
    def correlate(self, h: Tensor) -> Tensor:
        """``Wᵀh``: ``(B, m)`` to ``(B, n)``."""

    @abstractmethod
    def select(
        self,
        h: Tensor,
        b_enc: Tensor | None,
        selection: Selection,
        *,
        center: Tensor | None = None,
        check_finite: bool = False,
    ) -> SparseCode:
        """What ``selection`` takes of ``z = Wᵀ(h - center) + b_enc``.

        Raises:
            ValueError: wrong width; with ``check_finite``, NaN or infinity in ``h``.
        """

    @abstractmethod
    def decode(self, code: SparseCode) -> Tensor:
        """``Wx``: ``(B, m)``."""

    @abstractmethod
    def correlate_at(self, h: Tensor, indices: Tensor) -> Tensor:
        """Entries of ``Wᵀh`` at ``indices (B, k)``."""

    @abstractmethod
    def gram(self, indices: Tensor) -> Tensor:
        """``W_SᵀW_S`` for each support: ``(B, k)`` to ``(B, k, k)``."""

    @abstractmethod
    def columns(self, indices: Tensor) -> Tensor:
        """Dense columns: ``(...)`` integer to ``(..., m)``."""

    @abstractmethod
    def subset(self, features: Tensor) -> Self:
        """The matrix of the named columns, in that order."""

    @abstractmethod
    def with_values(self, values: Tensor) -> Self:
        """A matrix on the same supports with other ``values``."""

    def norms(self) -> Tensor:
        """Column norms ``(n,)``."""
        return self.values.norm(dim=1)

    def detach(self) -> Self:
        """The same matrix outside the autograd graph."""
        return self.with_values(self.values.detach())

    def unit(self, dtype: torch.dtype) -> tuple[Self, Tensor]:
        """The matrix with unit columns in ``dtype`` and the norms ``(n,)`` it had; a zero column stays zero, norm 1."""
        rows = self.values.to(dtype)
        peak = rows.abs().amax(dim=1, keepdim=True)  # first, so that squares neither overflow nor vanish
        usable = peak > torch.finfo(dtype).tiny ** 0.5
        peak = torch.where(usable, peak, 1.0)
        scaled = torch.where(usable, rows / peak, 0.0)
        length = torch.where(usable, scaled.norm(dim=1, keepdim=True), 1.0)
        return self.with_values(scaled / length), (length * peak).squeeze(1)

    def to_dense(self) -> Tensor:
        """``(m, n)``."""
        return self.columns(torch.arange(self.d_sae, device=self.device)).T

    def synthesis(self) -> Callable[[Tensor], Tensor]:
        """``x ↦ Wx`` for dense codes: ``(B, n)`` to ``(B, m)``."""
        dense = self.to_dense()
        return lambda x: x @ dense.T

    def whole_gram(self) -> Tensor | None:
        """``WᵀW (n, n)`` where it is one fast product, else ``None``."""
        return None

    def tied_error(self, h: Tensor, b_enc: Tensor, b_dec: Tensor, selection: Selection) -> TiedError | None:
        """The training error of a tied encoder in one fused call, or ``None`` where there is no such call."""
        return None


@dataclass(frozen=True)
class ExpanderMatrix(Matrix):
    """``W[rows[j, t], j] = values[j, t]``: ``d`` entries in each column, ``Wᵀh`` in ``d·n`` multiplications.

    Attributes:
        held: bool ``(n, d)`` where columns have fewer entries than that: at the others values must be 0. Operations
            need not know it; :meth:`with_values` sees to it.
    """

    rows: Tensor
    values: Tensor
    d_in: int
    held: Tensor | None = None

    @classmethod
    def from_entries(cls, rows: Tensor, values: Tensor, d_in: int) -> Self:
        """From integer ``rows (n, d)`` in any order and their ``values``. Raises ``ValueError`` for bad rows."""
        rows, values = sort_entries(rows, values)
        check_rows(rows, d_in)
        return cls(rows, values, d_in)

    @property
    def support(self) -> Tensor:
        return self.rows

    def correlate(self, h: Tensor) -> Tensor:
        return ops.correlate(h, self.rows, self.values, m=self.d_in)

    def select(
        self,
        h: Tensor,
        b_enc: Tensor | None,
        selection: Selection,
        *,
        center: Tensor | None = None,
        check_finite: bool = False,
    ) -> SparseCode:
        return ops.encode(
            h, self.rows, self.values, b_enc, selection, center=center, m=self.d_in, check_finite=check_finite
        )

    def decode(self, code: SparseCode) -> Tensor:
        return ops.decode(code, self.rows, self.values, self.d_in)

    def correlate_at(self, h: Tensor, indices: Tensor) -> Tensor:
        return ops.correlate_at(h, indices, self.rows, self.values, m=self.d_in)

    def gram(self, indices: Tensor) -> Tensor:
        return ops.gram(indices, self.rows, self.values, self.d_in)

    def columns(self, indices: Tensor) -> Tensor:
        picked = indices.long()
        out = self.values.new_zeros(*indices.shape, self.d_in)
        return out.scatter(-1, self.rows[picked].long(), self.values[picked])

    def subset(self, features: Tensor) -> Self:
        held = None if self.held is None else self.held[features]
        return replace(self, rows=self.rows[features], values=self.values[features], held=held)

    def with_values(self, values: Tensor) -> Self:
        return replace(self, values=values if self.held is None else values.masked_fill(~self.held, 0))

    def synthesis(self) -> Callable[[Tensor], Tensor]:
        n, d = self.rows.shape
        column = torch.arange(n, device=self.device).repeat_interleave(d)
        places = torch.stack([self.rows.flatten().long(), column])
        flat, shape = self.values.flatten(), (self.d_in, n)
        sparse = torch.sparse_coo_tensor(places, flat, shape, check_invariants=False).coalesce()
        return lambda x: (sparse @ x.T).T

    def tied_error(self, h: Tensor, b_enc: Tensor, b_dec: Tensor, selection: Selection) -> TiedError:
        return tied_error(h, self.rows, self.values, b_enc, b_dec, selection)


@dataclass(frozen=True)
class DenseMatrix(Matrix):
    """``W = valuesᵀ`` with ``values (n, m)``: a feature's column is one contiguous row in memory."""

    values: Tensor

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.values.shape[1]

    def correlate(self, h: Tensor) -> Tensor:
        return F.linear(self._fitting(h), self.values)

    def select(
        self,
        h: Tensor,
        b_enc: Tensor | None,
        selection: Selection,
        *,
        center: Tensor | None = None,
        check_finite: bool = False,
    ) -> SparseCode:
        flat = self._fitting(h).reshape(-1, self.d_in)
        code = dense.encode(flat, self.values, b_enc, selection, center=center, check_finite=check_finite)
        return code.reshape(*h.shape[:-1])

    def decode(self, code: SparseCode) -> Tensor:
        flat = code.reshape(-1)
        return dense.decode(flat.indices, flat.values, self.values).reshape(*code.batch_shape, self.d_in)

    def correlate_at(self, h: Tensor, indices: Tensor) -> Tensor:
        flat = indices.reshape(-1, indices.shape[-1])
        return dense.correlate_at(self._fitting(h).reshape(-1, self.d_in), flat, self.values).reshape(indices.shape)

    def gram(self, indices: Tensor) -> Tensor:
        columns = self.columns(indices)
        return columns @ columns.mT

    def columns(self, indices: Tensor) -> Tensor:
        return self.values[indices.long()]

    def subset(self, features: Tensor) -> Self:
        return replace(self, values=self.values[features])

    def with_values(self, values: Tensor) -> Self:
        return replace(self, values=values)

    def to_dense(self) -> Tensor:
        return self.values.T

    def whole_gram(self) -> Tensor:
        return self.values @ self.values.T

    def _fitting(self, h: Tensor) -> Tensor:
        if h.shape[-1] != self.d_in:
            raise ValueError(f"activations have width {h.shape[-1]}, the dictionary has d_in = {self.d_in}")
        return h
