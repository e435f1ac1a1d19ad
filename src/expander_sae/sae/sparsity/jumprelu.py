"""JumpReLU: a learned threshold for each feature, with straight-through gradients (Rajamanoharan et al. 2024b)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expander_sae.ops import Selection, SparseCode
from expander_sae.sae.sparsity.adapted import RATE, Adapted
from expander_sae.sae.sparsity.base import Score

_LOWEST = 1e-3  # threshold at the start, in units; the logarithm needs a positive one


@dataclass(frozen=True)
class JumpCode(SparseCode):
    """A code in training, with slots for scores just below their thresholds too: their values are 0.

    Attributes:
        fires: 1 where a slot's score is above its threshold; differentiable in the thresholds.
    """

    fires: Tensor

    def detach(self) -> SparseCode:  # type: ignore[override]
        return SparseCode(self.indices, self.values.detach())


class JumpReLU(Adapted):
    """Scores above a threshold of their feature's own: ``x_j = z_j · [z_j > θ_j]`` (arXiv 2407.14435).

    ``loss = mean ‖h - ĥ‖² + λ · mean ‖x‖₀``. The thresholds ``θ_j = unit · exp(log_threshold_j)`` get the paper's
    pseudo-derivatives with a rectangle of width ``bandwidth · unit``: ``-θ_j/ε`` of the value and ``-1/ε`` of the count
    where ``|z_j - θ_j| < ε/2`` and ``z_j > 0``. Scores in that window below the threshold are collected as well, so
    that both sides are felt. ``λ`` is the adapted coefficient times ``unit²``, in place of the paper's search for the
    coefficient that gives a wanted count.

    Args:
        d_sae, k, capacity, coefficient, rate: see :class:`Adapted`.
        bandwidth: width of the rectangle, in units of the activations.

    Raises:
        ValueError: as :class:`Adapted`; a bandwidth that is not positive.
    """

    kind = "jumprelu"
    options = (*Adapted.options, "bandwidth")

    def __init__(
        self,
        d_sae: int,
        k: int,
        *,
        capacity: int | None = None,
        coefficient: float = 1.0,
        rate: float = RATE,
        bandwidth: float = 1.0,
    ) -> None:
        super().__init__(d_sae, k, capacity=capacity, coefficient=coefficient, rate=rate)
        if not 0 < bandwidth < math.inf:
            raise ValueError(f"bandwidth must be positive and finite, got {bandwidth}")
        self.bandwidth = float(bandwidth)
        self.log_threshold = nn.Parameter(torch.zeros(d_sae))

    @property
    def threshold(self) -> Tensor:
        """``θ (n,)``, in the activations' own units."""
        return self.log_threshold.exp() * self.scale.to(self.log_threshold.dtype)

    @property
    def window(self) -> Tensor:
        """``ε (1,)``: the bandwidth in the activations' own units."""
        return self.bandwidth * self.scale

    def selection(self) -> Selection | None:
        return None if self.training else Selection(self.capacity, self.threshold.detach())

    def forward(self, score: Score) -> SparseCode:
        if (selection := self.selection()) is not None:
            return score(selection)
        threshold = self.threshold
        lowest = (threshold.detach() - self.window.to(threshold.dtype) / 2).clamp_min(0.0)
        found = score(Selection(self.capacity, lowest))
        own = threshold.index_select(0, found.indices.flatten().long()).view(found.indices.shape)
        values, fires = _Jump.apply(found.values, own, self.window)  # type: ignore[misc]
        return JumpCode(found.indices, values, fires)

    def penalty(self, code: SparseCode) -> Tensor:
        assert isinstance(code, JumpCode), "a code of training"
        return (self.strength * self.scale**2).to(code.fires.dtype).squeeze() * code.fires.sum(dim=-1).mean()

    def start_from(self, cuts: Tensor, bias: Tensor) -> None:
        threshold = torch.maximum(cuts, _LOWEST * self.scale)
        self.log_threshold.copy_((threshold / self.scale).log())

    @torch.no_grad()
    def reset_features(self, features: Tensor, bias: Tensor | None) -> None:
        self.log_threshold[features] = self.log_threshold.median()


class _Jump(torch.autograd.Function):
    """``z · [z > θ]`` and ``[z > θ]``, with the pseudo-derivatives of both by ``θ``."""

    @staticmethod
    def forward(z: Tensor, threshold: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        above = z > threshold
        return z * above, above.to(z.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_fires: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        z, threshold, window, fires = ctx.saved_tensors
        near = ((z - threshold).abs() < window / 2) & (z > 0)  # an empty slot has z = 0
        by_threshold = -(threshold * grad + grad_fires) * (near / window).to(z.dtype)
        return grad * fires, by_threshold, None
