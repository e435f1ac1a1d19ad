"""Which features fire: counters, dead features, and resampling of those that fire too rarely."""

from __future__ import annotations

import torch
from torch import Tensor

from expander_sae.ops import SparseCode
from expander_sae.sae import SAE
from expander_sae.training.config import TrainConfig

_MOST = 0.8  # of all features; the paper leaves a dictionary alone that is dead beyond it: the fault is elsewhere then


class FeatureUse:
    """Counters of one run, on the SAE's device.

    Attributes:
        fires: int64 ``(n,)``, tokens on which each feature fired (nonzero) since the last resampling.
        idle_tokens: int64 ``(n,)``, tokens since each feature's last fire.
    """

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.fires = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.idle_tokens = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._none_dead_for = 0  # tokens for which the last look rules dead features out

    @torch.no_grad()
    def count(self, code: SparseCode) -> None:
        """Take in the code ``(B, k)`` of a batch. Empty slots have value 0 and do not count."""
        d_sae, tokens = len(self.fires), code.indices.shape[0]
        where = torch.where(code.values != 0, code.indices, d_sae).flatten()  # the others meet beyond the end
        if where.device.type == "cpu":
            batch = torch.bincount(where, minlength=d_sae + 1)[:d_sae]
        else:  # bincount waits for the device there
            batch = torch.zeros(d_sae + 1, dtype=torch.int64, device=where.device)
            batch = batch.scatter_add_(0, where.long(), torch.ones_like(where, dtype=torch.int64))[:d_sae]
        self.fires += batch
        self.idle_tokens += tokens
        self.idle_tokens.masked_fill_(batch > 0, 0)
        self._none_dead_for -= tokens

    def dead(self, after: int) -> Tensor | None:
        """Features ``(f,)`` that have not fired for more than ``after`` tokens; ``None`` if there are none.

        Looks only when there can be one: the longest idle feature at the last look needs that many tokens more.
        """
        if self._none_dead_for > 0:
            return None
        longest = int(self.idle_tokens.max())
        if longest <= after:
            self._none_dead_for = after + 1 - longest
            return None
        return (self.idle_tokens > after).nonzero().flatten()

    def num_dead(self, after: int) -> int:
        """How many features have not fired for more than ``after`` tokens."""
        return int((self.idle_tokens > after).sum())

    def restore(self, fires: Tensor, idle_tokens: Tensor) -> None:
        """Go on from saved counters."""
        self.fires, self.idle_tokens = fires, idle_tokens
        self._none_dead_for = 0

    def rarely_fired(self, below: int) -> Tensor:
        """Features ``(f,)`` with fewer than ``below`` fires since the last call; starts the count afresh."""
        features = (self.fires < below).nonzero().flatten()
        self.fires.zero_()
        return features


@torch.no_grad()
def resample(sae: SAE, use: FeatureUse, residual: Tensor, config: TrainConfig, step: int) -> int:
    """Aim rarely firing features at rows of ``residual (B, m)``, drawn with probability proportional to their energy.

    Each takes the residual restricted to its support. Returns how many were re-aimed.
    """
    features = use.rarely_fired(config.resample_below)
    energy = residual.square().sum(dim=1)
    if not 0 < len(features) <= _MOST * sae.d_sae or not bool(torch.isfinite(energy).all()) or not bool(energy.any()):
        return 0
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) % 2**64)
    chosen = torch.multinomial(energy.cpu().double(), len(features), replacement=True, generator=generator)
    dictionary, norm = sae.dictionary, 1.0
    if config.resample_norm == "inverse-sqrt-degree" and dictionary.unit_norm:  # else the column itself would shrink
        norm = (dictionary.degree or dictionary.d_in) ** -0.5
    sae.reset_features(features, residual[chosen.to(residual.device)], norm)
    use.idle_tokens[features] = 0
    return len(features)
