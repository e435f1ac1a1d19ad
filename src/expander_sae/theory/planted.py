"""Does OMP find a code again? Real codes are planted under noise, and measures of them predict the outcome."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expander_sae.dictionary import Matrix
from expander_sae.ops import SparseCode
from expander_sae.pursuit import omp
from expander_sae.theory.on_codes import Measures, unit_values


@dataclass(frozen=True)
class Recovery:
    """How OMP did on planted codes.

    Attributes:
        exact: bool ``(B,)``: its first ``|S|`` selections are ``S``.
        share: ``(B,)``: the share of ``S`` among them.
    """

    exact: Tensor
    share: Tensor


@torch.no_grad()
def recover(matrix: Matrix, code: SparseCode, noise: Tensor, seed: int = 0) -> Recovery:
    """Plant ``Wx + e`` with the real support and coefficients, and run OMP on it.

    Args:
        matrix: the dictionary.
        code: ``(B, k)``; a slot of value 0 is unused.
        noise: ``(B,)``, ``‖e‖₂``; its direction is uniform on the sphere.
        seed: of the directions.
    """
    matrix = matrix.core  # noise without a preferred direction looks the same in every basis
    used = code.values != 0
    size = used.sum(dim=1)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(len(size), matrix.d_in, generator=generator, dtype=torch.float64).to(matrix.device)
    direction *= (noise.double().to(matrix.device) / direction.norm(dim=1)).unsqueeze(1)
    planted = matrix.decode(code).double() + direction
    found = omp(planted.to(matrix.dtype), matrix, max(1, int(size.max())))
    slot = torch.arange(found.k, device=size.device)
    chosen = (slot < size.unsqueeze(1)) & (found.values != 0)
    mine = torch.where(used, code.indices.long(), -1)
    theirs = torch.where(chosen, found.indices.long(), -2)
    common = (mine.unsqueeze(2) == theirs.unsqueeze(1)).sum(dim=(1, 2))
    return Recovery((common == size).cpu(), (common / size.clamp_min(1)).double().cpu())


def strongest(matrix: Matrix, code: SparseCode, size: int) -> SparseCode:
    """The ``size`` largest coefficients (of unit columns) of each code."""
    place = unit_values(matrix, code).abs().topk(min(size, code.k), dim=1).indices.to(code.indices.device)
    return SparseCode(code.indices.gather(1, place), code.values.gather(1, place))


def predictors(measures: Measures) -> dict[str, Tensor]:
    """Measures by name, each ``(B,)`` and turned so that more of it should mean recovery."""
    named = {
        "ERC": -measures.erc,
        "σ_min": measures.sigma_min,
        "condition": -measures.condition,
        "collisions": -measures.collisions,
        "coefficient / noise": measures.coefficient_to_noise,
        "coefficient / noise, over what T15 needs": measures.coefficient_to_noise / measures.needed,
    }
    return {name: values for name, values in named.items() if not bool(values.isnan().all())}


def auc(score: Tensor, positive: Tensor) -> float | None:
    """Area under the ROC curve: how often a positive scores above a negative, ties half; ``None`` without both."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    above = float(_ranks(score)[positive].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def rank_correlation(one: Tensor, other: Tensor) -> float | None:
    """Spearman's: the correlation of ranks, ties at their mean; ``None`` where one of them is constant."""
    ranks = torch.stack([_ranks(one), _ranks(other)])
    ranks -= ranks.mean(dim=1, keepdim=True)
    length = ranks.norm(dim=1)
    return float(ranks[0] @ ranks[1] / length.prod()) if bool((length > 0).all()) else None


def _ranks(values: Tensor) -> Tensor:
    """1 to ``B``, equal values at their mean rank; NaN counts as lowest."""
    _, which, counts = torch.unique(
        values.double().nan_to_num(-torch.inf, torch.inf, -torch.inf), return_inverse=True, return_counts=True
    )
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]
