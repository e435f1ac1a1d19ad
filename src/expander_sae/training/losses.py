"""Loss terms beside the squared error."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from expander_sae.ops import SparseCode
from expander_sae.sae import SAE


def aux_error(sae: SAE, h: Tensor, residual: Tensor, dead: Tensor, count: int) -> Tensor:
    """AuxK: the squared error ``mean_b ‖residual - guess‖²`` of the dead features' best attempt at the residual.

    Args:
        sae: with an encoder that ranks features.
        h: activations ``(B, m)``.
        residual: what the SAE leaves of them ``(B, m)``, outside the graph.
        dead: the features ``(f,)`` that help.
        count: how many of them per sample, at most ``f``.
    """
    guess = sae.reconstruct_with(h, dead, min(count, len(dead)))
    return (residual - guess).square().sum(dim=1).mean()


def multi_error(sae: SAE, h: Tensor, times: int) -> Tensor:
    """Multi-TopK: the squared error of ``h (B, m)`` with ``times`` as many features for each sample, at most all."""
    return sae.squared_error(h, sae.sparsity.among(min(times * sae.k, sae.d_sae))).error


def rule_terms(sae: SAE, h: Tensor, code: SparseCode) -> Iterator[Tensor]:
    """What the sparsity rule adds to the squared error of ``h (B, m)`` with its ``code``; nothing for most."""
    if (penalty := sae.sparsity.penalty(code)) is not None:
        yield penalty
    if (auxiliary := sae.sparsity.auxiliary(code)) is not None:
        yield sae.frozen_error(h, auxiliary)
