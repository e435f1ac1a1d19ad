"""Gated: one path decides which features are active, another how much (Rajamanoharan et al. 2024a)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expander_sae.ops import Selection, SparseCode
from expander_sae.sae.sparsity.adapted import RATE, Adapted
from expander_sae.sae.sparsity.base import Score


@dataclass(frozen=True)
class GatedCode(SparseCode):
    """A code with the gates that let it through.

    Attributes:
        gate: the positive gate scores, a code of its own.
    """

    gate: SparseCode

    def detach(self) -> SparseCode:  # type: ignore[override]
        return SparseCode(self.indices, self.values.detach())


class Gated(Adapted):
    """Gates ``π = Wᵀ(h - b_dec) + b_gate``, magnitudes ``ReLU(exp(r_mag)·Wᵀ(h - b_dec) + b_mag)`` where ``π > 0``.

    The two paths share the encoder's directions (arXiv 2404.16014, eq. 6); ``b_gate`` is the encoder's ``b_enc``.
    ``loss = mean ‖h - ĥ‖² + λ · mean Σ ReLU(π_j) + mean ‖h - ĥ_frozen(ReLU(π))‖²``: the last term reconstructs from the
    gates with the decoder held still, and is what the gates learn by beside the penalty. ``λ`` as in :class:`ReluL1`.

    Arguments and errors are those of :class:`Adapted`.
    """

    kind = "gated"

    def __init__(
        self, d_sae: int, k: int, *, capacity: int | None = None, coefficient: float = 1.0, rate: float = RATE
    ) -> None:
        super().__init__(d_sae, k, capacity=capacity, coefficient=coefficient, rate=rate)
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def selection(self) -> None:
        return None  # magnitudes are another function of the scores

    def forward(self, score: Score) -> SparseCode:
        gate = score(Selection(self.capacity, 0.0))
        assert score.bias is not None, "an encoder without a bias has been refused"
        chosen = gate.indices.flatten().long()
        stretch, b_mag, b_gate = (
            vector.index_select(0, chosen).view(gate.indices.shape)
            for vector in (self.r_mag.exp(), self.b_mag, score.bias)
        )
        values = (stretch * (gate.values - b_gate) + b_mag).relu() * (gate.values > 0)
        return GatedCode(torch.where(values > 0, gate.indices, 0), values, gate)

    def penalty(self, code: SparseCode) -> Tensor:
        return self.linear_penalty(self.auxiliary(code))

    def auxiliary(self, code: SparseCode) -> SparseCode:
        assert isinstance(code, GatedCode), "a code of training"
        return code.gate

    @torch.no_grad()
    def reset_features(self, features: Tensor, bias: Tensor | None) -> None:
        super().reset_features(features, bias)
        self.r_mag[features] = 0
        self.b_mag[features] = self.b_mag.median()

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        super().rescale_(factor)
        self.b_mag /= factor
