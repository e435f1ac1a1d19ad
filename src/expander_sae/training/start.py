"""What a run knows of its activations before the first step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from expander_sae.data.sources import ActivationSource
from expander_sae.sae import SAE

_STATISTICS_ROWS = 16384  # sample for the mean and scale of activations


def mean_and_variance(source: ActivationSource, seed: int) -> tuple[Tensor, float]:
    """``h̄ (d_in,)`` in float64 and ``mean ‖h - h̄‖²``, both of a sample: where training starts from."""
    sample = source.sample(min(_STATISTICS_ROWS, len(source)), seed).double()
    mean = sample.mean(dim=0)
    return mean, float((sample - mean).square().sum(dim=1).mean())


def origin_of(source: ActivationSource, sae: SAE) -> dict[str, Any]:
    """What an SAE trained on ``source`` records of it: ``source.origin()``.

    Of a source that does not know where it comes from: what the SAE's metadata say already, else the size alone.
    """
    origin = getattr(source, "origin", None)
    if origin is not None:
        return dict(origin())
    return sae.metadata.get("trained_on") or {"d_in": source.d_in, "rows": len(source)}
