"""What a run knows of its activations before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from expander_sae.data.sources import ActivationSource
from expander_sae.dictionary import OrthogonalBasis
from expander_sae.progress import progress
from expander_sae.sae import SAE, SAEConfig

_STATISTICS_ROWS = 16384  # sample for the mean and scale of activations
_ROWS_AT_ONCE = 8192


def build_sae(config: SAEConfig, source: ActivationSource, covariance: Callable[[], Tensor] | None = None) -> SAE:
    """The untrained SAE of a configuration, its basis found from the activations it will be trained on.

    A ``weighted`` mask of which the options say nothing of weights takes the variances of the coordinates.

    Args:
        config: which SAE.
        source: the activations.
        covariance: gives theirs where it is wanted, for who builds many SAEs on them; default :func:`covariance_of`.

    Raises:
        ValueError: sizes that do not fit.
    """
    known = cache(covariance or (lambda: covariance_of(source)))
    basis = None
    if config.basis == "pca":
        basis = principal_axes(known())
    elif config.basis == "random":
        basis = OrthogonalBasis.random(source.d_in, config.seed)
    if config.mask == "weighted" and "weights" not in config.mask_options:
        axes = torch.eye(source.d_in, dtype=torch.float64) if basis is None else basis.matrix().double()
        variances = (axes * (known() @ axes)).sum(dim=0).clamp_min(0)
        # Six digits: they are kept in the recipe of the mask, as text.
        weights = [float(f"{variance:.6g}") for variance in variances.tolist()]
        config = replace(config, mask_options=config.mask_options | {"weights": weights})
    sae = config.build(source.d_in)
    sae.enter_basis_(basis)
    return sae


def principal_axes(covariance: Tensor) -> OrthogonalBasis:
    """The eigenvectors of a covariance ``(m, m)``, largest variance first.

    Each vector's largest entry is positive, so that the basis does not depend on a library's choice of signs.
    """
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)
    peak = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return OrthogonalBasis((vectors * peak.sign()).float(), "pca")


def covariance_of(source: ActivationSource) -> Tensor:
    """``(m, m)`` in float64, over all rows, read once."""
    rows, m = len(source), source.d_in
    middle = mean_and_variance(source, 0)[0]  # sums are taken about it: no cancellation
    first, second = torch.zeros(m, dtype=torch.float64), torch.zeros(m, m, dtype=torch.float64)
    with progress("Covariance", rows, "row") as advance:
        for start in range(0, rows, _ROWS_AT_ONCE):
            h = source.rows(slice(start, start + _ROWS_AT_ONCE)).double().cpu() - middle.cpu()
            first += h.sum(dim=0)
            second.addmm_(h.T, h)
            advance(len(h))
    mean = first / rows
    return second / rows - torch.outer(mean, mean)


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
