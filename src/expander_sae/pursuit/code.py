"""What a pursuit returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from expander_sae.ops import SparseCode


@dataclass(frozen=True)
class PursuitCode(SparseCode):
    """A sparse code and how the pursuit that found it ended.

    Features stand in the order they were selected. Used slots come first; an unused slot has index 0 and value 0, so
    it adds nothing to a reconstruction.

    Attributes:
        residual_norms: float ``(...)``, ``‖h - b_dec - Wx‖₂`` of the code as returned.
        iterations: int32 ``(...)``, rounds done: selections for a greedy solver, steps for an iterative one.
        stopped_early: bool ``(...)``, fewer than ``k`` features were used: the tolerance was met, the residual
            vanished, or no admissible column was left (all others zero, dependent, or of the wrong sign).
    """

    residual_norms: Tensor
    iterations: Tensor
    stopped_early: Tensor

    def reshape(self, *batch_shape: int) -> Self:
        """The same code with other leading dimensions."""
        return replace(
            self,
            indices=self.indices.reshape(*batch_shape, self.k),
            values=self.values.reshape(*batch_shape, self.k),
            residual_norms=self.residual_norms.reshape(batch_shape),
            iterations=self.iterations.reshape(batch_shape),
            stopped_early=self.stopped_early.reshape(batch_shape),
        )
