"""Rules without a fixed count: a penalty makes codes sparse, and its coefficient is adapted until the mean is ``k``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from expander_sae.ops import Selection, SparseCode
from expander_sae.sae.sparsity.base import Score, Sparsity, capacity_of
from expander_sae.stored import Section, take_tensor

RATE = 0.02
_MEMORY = 0.99  # of the running means that the log shows
_MOST = 2.0  # the count is compared with k within this factor: a start far from k is no reason to overshoot


class Adapted(Sparsity):
    """A penalty whose coefficient is adapted so that the mean count of features is ``k``.

    After each step the coefficient is multiplied with ``(L0 / k)^rate``, ``L0`` the mean count of that batch, the ratio
    held within a factor of two. It is in units of the activations (see :meth:`Sparsity.begin`), so that one start
    serves all models.

    Overflow: a sample has at most ``capacity`` features; of more, the best are kept. The share of samples that filled
    their capacity is in the training log. At a random start it is all of them, until the penalty is felt.

    Args:
        d_sae: features ``n``.
        k: features per sample on average.
        capacity: the most features of one sample. Default ``4 k``, at most ``d_sae``.
        coefficient: of the penalty, to start with.
        rate: speed of its adaptation; 0 keeps it as it is.

    Raises:
        ValueError: ``capacity`` outside ``[k, d_sae]``, a coefficient or rate that is negative or not finite.
    """

    needs_unit_norm = True
    options: ClassVar[tuple[str, ...]] = ("capacity", "coefficient", "rate")
    """Names of the constructor's options, each an attribute as well."""

    def __init__(
        self,
        d_sae: int,
        k: int,
        *,
        capacity: int | None = None,
        coefficient: float = 1.0,
        rate: float = RATE,
    ) -> None:
        super().__init__(d_sae, k)
        self.capacity = capacity_of(capacity, self.k, d_sae)
        self.coefficient, self.rate = float(coefficient), float(rate)
        for name, value in (("coefficient", coefficient), ("rate", rate)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        self.strength: Tensor
        """The coefficient as it is now."""
        self.unit: Tensor
        """Root mean square of a coordinate of the centred activations; 0 before training, and read as 1 then."""
        self.mean_count: Tensor
        self.overflow: Tensor
        self.register_buffer("strength", torch.full((1,), self.coefficient))
        self.register_buffer("unit", torch.zeros(1))
        self.register_buffer("mean_count", torch.full((1,), -1.0))  # below 0: no step was made yet
        self.register_buffer("overflow", torch.zeros(1))

    def among(self, count: int) -> Selection:
        return Selection(count, 0.0)

    @property
    def signed(self) -> bool:
        return False

    @property
    def scale(self) -> Tensor:
        """``(1,)``: the unit in use."""
        return torch.where(self.unit > 0, self.unit, 1.0)

    @property
    def wants_start(self) -> bool:
        return not bool(self.unit > 0)

    @torch.no_grad()
    def begin(self, unit: float, cuts: Tensor, bias: Tensor) -> None:
        self.unit.fill_(unit)
        self.start_from(cuts, bias)

    def start_from(self, cuts: Tensor, bias: Tensor) -> None:
        """Let each feature exceed its threshold on a share ``k / n`` of the samples: as many as are wanted, from the
        start. From thresholds at 0 half of all features would fire, and most of a short run would go by until they
        do not."""
        bias -= cuts

    @torch.no_grad()
    def reset_features(self, features: Tensor, bias: Tensor | None) -> None:
        assert bias is not None, "an encoder without a bias has been refused"
        bias[features] = bias.median()  # at 0 a feature fires on half of the samples

    @torch.no_grad()
    def after_step(self, code: SparseCode) -> None:
        counts = (code.values != 0).sum(dim=-1).to(self.strength.dtype)
        count, full = counts.mean(), (counts >= self.capacity).to(counts.dtype).mean()
        self.strength *= (count / self.k).clamp(1 / _MOST, _MOST) ** self.rate
        fresh = self.mean_count < 0
        self.overflow.copy_(torch.where(fresh, full, torch.lerp(full, self.overflow, _MEMORY)))
        self.mean_count.copy_(torch.where(fresh, count, torch.lerp(count, self.mean_count, _MEMORY)))

    def linear_penalty(self, code: SparseCode) -> Tensor:
        """``λ · mean Σ_j x_j``, ``λ`` the coefficient times the unit."""
        return (self.strength * self.scale).to(code.values.dtype).squeeze() * code.values.sum(dim=-1).mean()

    def report(self) -> dict[str, float]:
        return {"l0": float(self.mean_count), "overflow": float(self.overflow), "coefficient": float(self.strength)}

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        self.unit /= factor

    def config(self) -> dict[str, Any]:
        return super().config() | {name: getattr(self, name) for name in self.options}

    def stored_tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], d_sae: int) -> Self:
        section.only("kind", "version", "k", *cls.options)
        k, capacity = section.integer("k", 1, d_sae), section.integer("capacity", 1, d_sae)
        numbers = {name: section.number(name) for name in cls.options if name != "capacity"}
        rule = cls(d_sae, k, capacity=capacity, **numbers)
        for name, tensor in rule.state_dict().items():
            found = take_tensor(tensors, name, tuple(tensor.shape))
            setattr(rule, name, nn.Parameter(found) if name in rule._parameters else found)
        return rule


class ReluL1(Adapted):
    """All positive scores, under a penalty on their sum (Cunningham et al. 2023, arXiv 2309.08600, §2.2).

    ``loss = mean ‖h - ĥ‖² + λ · mean Σ_j x_j`` on unit columns: without them the sum says nothing, so a dictionary
    without ``unit_norm`` is refused. ``λ`` is the adapted coefficient times the unit of :class:`Adapted`.
    """

    kind = "relu-l1"

    def selection(self) -> Selection | None:
        # In training the fused path is no use: the penalty needs the code inside the graph.
        return None if self.training else self.among(self.capacity)

    def forward(self, score: Score) -> SparseCode:
        return score(self.among(self.capacity))

    def penalty(self, code: SparseCode) -> Tensor:
        return self.linear_penalty(code)
