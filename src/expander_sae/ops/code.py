"""The public form of a sparse code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseCode:
    """Active features and their coefficients; the dense ``(..., n)`` array is never built on the way.

    Attributes:
        indices: int32 ``(..., k)``, features; TopK encoders sort them by descending score, ties to the lower index.
        values: float ``(..., k)``, coefficients; an unused slot has value 0.
    """

    indices: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if self.indices.shape != self.values.shape:
            raise ValueError(
                f"indices {tuple(self.indices.shape)} and values {tuple(self.values.shape)} must have one shape"
            )

    @property
    def k(self) -> int:
        """Slots a sample."""
        return self.indices.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions."""
        return self.indices.shape[:-1]

    def to_dense(self, d_sae: int) -> Tensor:
        """The ``(..., d_sae)`` array; a feature named twice gets the sum."""
        dense = self.values.new_zeros(*self.batch_shape, d_sae)
        return dense.scatter_add(-1, self.indices.long(), self.values)

    def reshape(self, *batch_shape: int) -> Self:
        """The same code with other leading dimensions."""
        return replace(
            self, indices=self.indices.reshape(*batch_shape, self.k), values=self.values.reshape(*batch_shape, self.k)
        )

    def detach(self) -> Self:
        """The same code outside the autograd graph."""
        return replace(self, values=self.values.detach())
