"""The basis a dictionary's sparse columns are written in: ``W = R·A`` with ``R`` orthogonal ``(m, m)``.

A mask lives on coordinates, so it matters which. Everything between the two products with ``R`` sees the sparse part
``A`` and activations in the coordinates of the basis, and runs at its speed: :attr:`Matrix.core` and
:meth:`Matrix.coordinates` take both apart. A new kind of basis is a subclass of :class:`Basis` and its entry in
:data:`BASES`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from expander_sae.dictionary.matrix import Matrix
from expander_sae.ops import Selection, SparseCode
from expander_sae.registry import Registry
from expander_sae.stored import Section, take_tensor

_SLACK = 16  # how many rounding errors of its type, float32 at best, RᵀR may be away from the identity


class Basis(nn.Module):
    """An orthogonal ``R`` of shape ``(m, m)``."""

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    d_in: int

    def matrix(self) -> Tensor:
        """``R``: its columns are the basis vectors."""
        raise NotImplementedError

    def coordinates(self, h: Tensor) -> Tensor:
        """``Rᵀh`` of ``h (..., m)``."""
        return h @ self.matrix().to(h.dtype)

    def vectors(self, y: Tensor) -> Tensor:
        """``Ry``: back from coordinates ``(..., m)``."""
        return y @ self.matrix().to(y.dtype).T

    @property
    def num_values(self) -> int:
        """Stored values."""
        raise NotImplementedError

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of what is stored of it."""
        digest = hashlib.sha256(json.dumps(self.config(), sort_keys=True).encode())
        for name, tensor in sorted(self.stored_tensors().items()):
            digest.update(name.encode() + tensor.cpu().double().numpy().tobytes())
        return digest.hexdigest()

    def config(self) -> dict[str, Any]:
        """The section of ``config.json`` that, with :meth:`stored_tensors`, rebuilds the basis."""
        return {"kind": self.kind, "version": self.version}

    def stored_tensors(self) -> dict[str, Tensor]:
        """What goes to disk."""
        return {}

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], d_in: int) -> Self:
        """Rebuild from :meth:`config` and :meth:`stored_tensors`. Raises ``ValueError`` for what does not fit."""
        raise NotImplementedError


class OrthogonalBasis(Basis):
    """Any orthogonal matrix, stored whole: ``m²`` values, whatever the number of features.

    It keeps its type when an SAE is converted to another: rounded and converted back it would not be orthogonal.

    Args:
        matrix: ``R (m, m)``, floating point.
        origin: where it comes from, in a word: ``"pca"``, ``"random"``, ...

    Raises:
        ValueError: not square, or not orthogonal up to rounding.
    """

    kind = "orthogonal"

    def __init__(self, matrix: Tensor, origin: str = "given") -> None:
        super().__init__()
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
            raise ValueError(f"a basis is a square matrix, got {matrix.dtype} {tuple(matrix.shape)}")
        wide = matrix.detach().double()
        away = float((wide.T @ wide - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)).abs().max())
        if not away <= _SLACK * max(torch.finfo(matrix.dtype).eps, torch.finfo(torch.float32).eps):
            raise ValueError(f"the basis is not orthogonal: an entry of RᵀR is {away:.2g} away from the identity's")
        self.d_in = len(matrix)
        self.origin = origin
        self.entries: Tensor
        self.register_buffer("entries", matrix.detach().contiguous())

    @classmethod
    def random(cls, d_in: int, seed: int = 0) -> OrthogonalBasis:
        """Uniform over the rotations and reflections of ``d_in`` dimensions."""
        generator = torch.Generator().manual_seed(seed)
        q, r = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator, dtype=torch.float64))
        return cls((q * r.diagonal().sign()).float(), "random")

    def matrix(self) -> Tensor:
        return self.entries

    @property
    def num_values(self) -> int:
        return self.entries.numel()

    def config(self) -> dict[str, Any]:
        return super().config() | {"origin": self.origin}

    def stored_tensors(self) -> dict[str, Tensor]:
        return {"entries": self.entries}

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], d_in: int) -> Self:
        section.only("kind", "version", "origin")
        return cls(take_tensor(tensors, "basis.entries", (d_in, d_in)), section.text("origin"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.entries = self.entries.to(fn(self.entries).device)
        return self

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, {self.origin}"


@dataclass(frozen=True)
class RotatedMatrix(Matrix):
    """``W = R·A``.

    Attributes:
        inner: the sparse part ``A``.
        basis: ``R``, held still.
    """

    inner: Matrix
    basis: Basis

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self.inner.values

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.inner.d_in

    @property
    def core(self) -> Matrix:
        return self.inner

    def coordinates(self, h: Tensor) -> Tensor:
        return self.basis.coordinates(h)

    def correlate(self, h: Tensor) -> Tensor:
        return self.inner.correlate(self.coordinates(h))

    def select(
        self,
        h: Tensor,
        b_enc: Tensor | None,
        selection: Selection,
        *,
        center: Tensor | None = None,
        check_finite: bool = False,
    ) -> SparseCode:
        middle = None if center is None else self.coordinates(center)
        return self.inner.select(self.coordinates(h), b_enc, selection, center=middle, check_finite=check_finite)

    def decode(self, code: SparseCode) -> Tensor:
        return self.basis.vectors(self.inner.decode(code))

    def correlate_at(self, h: Tensor, indices: Tensor) -> Tensor:
        return self.inner.correlate_at(self.coordinates(h), indices)

    def gram(self, indices: Tensor) -> Tensor:
        return self.inner.gram(indices)

    def columns(self, indices: Tensor) -> Tensor:
        return self.basis.vectors(self.inner.columns(indices))

    def subset(self, features: Tensor) -> Self:
        return replace(self, inner=self.inner.subset(features))

    def with_values(self, values: Tensor) -> Self:
        return replace(self, inner=self.inner.with_values(values))

    def norms(self) -> Tensor:
        return self.inner.norms()

    def synthesis(self) -> Callable[[Tensor], Tensor]:
        inner = self.inner.synthesis()
        return lambda x: self.basis.vectors(inner(x))

    def whole_gram(self) -> Tensor | None:
        return self.inner.whole_gram()


STANDARD = {"kind": "standard", "version": 1}
"""The section of a dictionary in the model's own coordinates: no basis."""
BASES: Registry[type[Basis]] = Registry("basis")
"""Bases by kind."""
BASES.add("orthogonal", OrthogonalBasis)


def basis_from(section: Section, tensors: Mapping[str, Tensor], d_in: int) -> Basis | None:
    """Rebuild a basis; ``None`` for the model's own coordinates. Raises ``ValueError`` as :meth:`Basis.from_config`."""
    if section.text("kind") == STANDARD["kind"]:
        section.only("kind", "version")
        section.version(1)
        return None
    return section.kind(BASES).from_config(section, tensors, d_in)
