"""Rules by rank: the best of a sample, and the best of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor

from expander_sae.ops import Selection, SparseCode
from expander_sae.sae.sparsity.base import Score, Sparsity, capacity_of
from expander_sae.stored import Section, take_tensor


class TopK(Sparsity):
    """The ``k`` largest scores of each sample (Gao et al. 2024, arXiv 2406.04093, §2.3).

    Args:
        d_sae, k: see :class:`Sparsity`.
        relu: only scores above 0, so that a sample may have fewer than ``k`` features: the field's habit. The paper
            ranks signed scores and keeps negative ones.
        rank: ``"signed"``, or ``"magnitude"`` for the largest ``|z|``.
    """

    kind = "topk"
    by_rank = True

    def __init__(
        self, d_sae: int, k: int, *, relu: bool = False, rank: Literal["signed", "magnitude"] = "signed"
    ) -> None:
        super().__init__(d_sae, k)
        if rank not in ("signed", "magnitude"):
            raise ValueError(f"rank must be 'signed' or 'magnitude', got {rank!r}")
        if relu and rank == "magnitude":
            raise ValueError("relu keeps positive scores, rank='magnitude' ranks both signs: choose one")
        self.relu = bool(relu)
        self.rank: Literal["signed", "magnitude"] = rank

    def selection(self) -> Selection:
        return self.among(self.k)

    def among(self, count: int) -> Selection:
        return Selection(count, 0.0 if self.relu else None, self.rank)

    @property
    def signed(self) -> bool:
        return not self.relu

    def config(self) -> dict[str, Any]:
        return super().config() | {"relu": self.relu, "rank": self.rank}

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], d_sae: int) -> Self:
        section.only("kind", "version", "k", "relu", "rank")
        rank: Any = section.text("rank")
        return cls(d_sae, section.integer("k", 1, d_sae), relu=section.boolean("relu"), rank=rank)


class BatchTopK(Sparsity):
    """The ``k · B`` largest positive scores of a batch (Bussmann et al. 2024, arXiv 2412.06410).

    At inference a sample must not depend on its neighbours: a threshold, learned as the running mean of each batch's
    smallest score taken, stands in for the batch.

    Args:
        d_sae: features ``n``.
        k: features per sample on average.
        capacity: the most features of one sample; beyond it the largest are kept. Default ``4 k``, at most ``d_sae``.
        momentum: of the running mean.

    Raises:
        ValueError: ``capacity`` outside ``[k, d_sae]``, ``momentum`` outside ``[0, 1)``.
    """

    kind = "batch-topk"

    def __init__(self, d_sae: int, k: int, *, capacity: int | None = None, momentum: float = 0.99) -> None:
        super().__init__(d_sae, k)
        self.capacity = capacity_of(capacity, self.k, d_sae)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.momentum = float(momentum)
        self.threshold: Tensor
        self.register_buffer("threshold", torch.full((), -1.0))  # below 0: no step was made yet

    def selection(self) -> Selection | None:
        learned = float(self.threshold)
        if self.training or learned < 0:
            return None
        return Selection(self.capacity, learned)

    def forward(self, score: Score) -> SparseCode:
        selection = self.selection()
        if selection is not None:
            return score(selection)
        code = score(Selection(self.capacity, 0.0))
        wanted = self.k * code.batch_shape.numel()
        scores = code.values.detach().flatten()
        if wanted >= scores.numel():
            return code
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.topk(wanted).indices] = True
        kept = kept.view(code.values.shape) & (code.values > 0)
        return SparseCode(torch.where(kept, code.indices, 0), torch.where(kept, code.values, 0.0))

    def among(self, count: int) -> Selection:
        return Selection(count, 0.0)

    @property
    def signed(self) -> bool:
        return False

    @torch.no_grad()
    def after_step(self, code: SparseCode) -> None:
        taken = torch.where(code.values > 0, code.values, torch.inf).min().to(self.threshold)
        mean = torch.where(self.threshold < 0, taken, torch.lerp(taken, self.threshold, self.momentum))
        self.threshold.copy_(torch.where(taken.isfinite(), mean, self.threshold))

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        self.threshold.copy_(torch.where(self.threshold < 0, self.threshold, self.threshold / factor))

    def config(self) -> dict[str, Any]:
        return super().config() | {"capacity": self.capacity, "momentum": self.momentum}

    def stored_tensors(self) -> dict[str, Tensor]:
        return {"threshold": self.threshold.reshape(1)}

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], d_sae: int) -> Self:
        section.only("kind", "version", "k", "capacity", "momentum")
        k, capacity = section.integer("k", 1, d_sae), section.integer("capacity", 1, d_sae)
        rule = cls(d_sae, k, capacity=capacity, momentum=section.number("momentum"))
        rule.threshold.copy_(take_tensor(tensors, "threshold", (1,))[0])
        return rule
