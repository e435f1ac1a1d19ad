"""What a sparsity rule is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from expander_sae.ops import Selection, SparseCode
from expander_sae.stored import Section


@dataclass(frozen=True)
class Score:
    """An encoder at work on a batch: call it with a selection, get the code.

    Attributes:
        encode: what is called.
        bias: ``(n,)``, what the encoder adds to the correlations; ``None`` if it has no bias.
    """

    encode: Callable[[Selection], SparseCode]
    bias: Tensor | None = None

    def __call__(self, selection: Selection) -> SparseCode:
        return self.encode(selection)


class Sparsity(nn.Module):
    """Turns an encoder's scores into a code.

    Buffers keep 32 bits where the rest of an SAE goes to 16: running means would stand still there.

    Args:
        d_sae: features ``n``.
        k: features per sample: exactly, at most or on average, as the rule says.

    Raises:
        ValueError: ``k`` outside ``[1, d_sae]``.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    needs_unit_norm: ClassVar[bool] = False
    """Whether the penalty is without meaning where columns may grow and codes shrink in turn."""
    by_rank: ClassVar[bool] = False
    """Whether each sample's best ``k`` are the code, so that :meth:`among` makes a wider one: for Multi-TopK."""

    def __init__(self, d_sae: int, k: int) -> None:
        super().__init__()
        k = operator.index(k)  # a numpy integer is no JSON
        if not 1 <= k <= d_sae:
            raise ValueError(f"k must be between 1 and d_sae = {d_sae}, got {k}: a code cannot have more features")
        self.k = k

    def selection(self) -> Selection | None:
        """The selection that is the whole rule as it stands, or ``None`` if the rule does more than select."""
        raise NotImplementedError

    def forward(self, score: Score) -> SparseCode:
        """The code of a batch."""
        selection = self.selection()
        assert selection is not None, "a rule that does more overrides this"
        return score(selection)

    def among(self, count: int) -> Selection:
        """How the best ``count`` features are taken, of all or of some: for AuxK and Multi-TopK."""
        raise NotImplementedError

    @property
    def signed(self) -> bool:
        """Whether a code may hold negative values."""
        raise NotImplementedError

    def penalty(self, code: SparseCode) -> Tensor | None:
        """What the rule adds to the loss of a batch, if anything."""
        return None

    def auxiliary(self, code: SparseCode) -> SparseCode | None:
        """Another code of the batch, whose squared error with the decoder held still is added to the loss."""
        return None

    @property
    def wants_start(self) -> bool:
        """Whether :meth:`begin` has something to do before training."""
        return False

    def begin(self, unit: float, cuts: Tensor, bias: Tensor) -> None:
        """Called before training, if it :attr:`wants_start`.

        Args:
            unit: root mean square of a coordinate of the centred activations.
            cuts: ``(n,)``, what a share ``k / n`` of each feature's scores exceeds.
            bias: ``(n,)``, of the encoder, to be written to.
        """

    def after_step(self, code: SparseCode) -> None:
        """Called after each step of training with the step's code, outside the graph."""

    def report(self) -> dict[str, float]:
        """What a line of the training log says of the rule."""
        return {}

    def reset_features(self, features: Tensor, bias: Tensor | None) -> None:
        """Start the named features afresh after their columns were; ``bias (n,)`` of the encoder may be written to."""

    def rescale_(self, factor: float) -> None:
        """Follow activations from ``factor · h`` to ``h``."""

    def config(self) -> dict[str, Any]:
        """The section of ``config.json`` that, with :meth:`stored_tensors`, rebuilds the rule."""
        return {"kind": self.kind, "version": self.version, "k": self.k}

    def stored_tensors(self) -> dict[str, Tensor]:
        """What goes to disk."""
        return {}

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], d_sae: int) -> Self:
        """Rebuild from :meth:`config` and :meth:`stored_tensors`. Raises ``ValueError`` for what does not fit."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        wide = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, before in wide.items():
            after = getattr(self, name)
            if after.dtype in (torch.float16, torch.bfloat16) and before.dtype not in (torch.float16, torch.bfloat16):
                setattr(self, name, before.to(after.device))
        return self


def capacity_of(capacity: int | None, k: int, d_sae: int) -> int:
    """The most features of one sample; default ``4 k``. Raises ``ValueError`` outside ``[k, d_sae]``."""
    if capacity is None:
        return min(4 * k, d_sae)
    if not k <= operator.index(capacity) <= d_sae:
        raise ValueError(f"capacity must be between k = {k} and d_sae = {d_sae}, got {capacity}")
    return operator.index(capacity)
