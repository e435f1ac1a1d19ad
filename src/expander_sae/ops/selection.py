"""Which of a sample's scores become its code."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from expander_sae.ops import arguments


@dataclass(frozen=True)
class Selection:
    """At most ``capacity`` features per sample: the best of those above ``threshold``.

    A sample with fewer than ``capacity`` features above the threshold leaves slots *empty*: index 0, value 0. Where
    more are above it, the best ``capacity`` are kept: that is what overflow means here. A ReLU after a TopK is the
    threshold 0.

    Attributes:
        capacity: slots per sample.
        threshold: a score up to it is not taken; ``None`` for no limit. A tensor ``(n,)`` has one for each feature: the
            best are then those with the largest margin ``z_j - threshold_j``.
        rank: ``"signed"`` for the largest ``z``; ``"magnitude"`` for the largest ``|z|``, which is also what the
            threshold is compared with. The code holds ``z`` either way.

    Raises:
        ValueError: ``capacity`` below 1, a threshold that is NaN, thresholds by feature with ``rank="magnitude"``.
    """

    capacity: int
    threshold: Tensor | float | None = None
    rank: Literal["signed", "magnitude"] = "signed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "capacity", operator.index(self.capacity))  # a plain int, for the operators' schemas
        if self.capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {self.capacity}")
        if self.rank not in ("signed", "magnitude"):
            raise ValueError(f"rank must be 'signed' or 'magnitude', got {self.rank!r}")
        if isinstance(self.threshold, Tensor):
            if self.rank == "magnitude":
                raise ValueError("rank='magnitude' takes one threshold, not one for each feature")
        elif self.threshold is not None and math.isnan(self.threshold):
            raise ValueError("the threshold is NaN")

    def check(self, n: int) -> None:
        """Raise ``ValueError`` unless ``capacity <= n`` and thresholds by feature have shape ``(n,)``."""
        arguments.capacity(self.capacity, n)
        arguments.bias("threshold", self.threshold if isinstance(self.threshold, Tensor) else None, n)

    @property
    def magnitude(self) -> bool:
        return self.rank == "magnitude"

    @property
    def floor(self) -> float:
        """The threshold of every feature once :meth:`bias` has taken care of those by feature; ``-inf``: none."""
        if self.threshold is None:
            return -math.inf
        return 0.0 if isinstance(self.threshold, Tensor) else float(self.threshold)

    def bias(self, b_enc: Tensor | None) -> Tensor | None:
        """``b_enc`` less the thresholds by feature, so that margins are ranked and compared with 0."""
        if not isinstance(self.threshold, Tensor):
            return b_enc
        threshold = self.threshold.detach()
        return -threshold if b_enc is None else b_enc - threshold

    def restore(self, indices: Tensor, values: Tensor) -> Tensor:
        """Scores from the margins that :meth:`bias` made of them; empty slots stay 0."""
        if not isinstance(self.threshold, Tensor):
            return values
        back = self.threshold.detach().to(values)[indices.long()]
        return values + (values.detach() != 0) * back
