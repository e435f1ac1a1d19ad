"""Loss terms beside the squared error."""

from __future__ import annotations

from torch import Tensor

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
