"""Which features a round takes: the best, the best ``L``, or ``L`` whose columns share no row."""

from __future__ import annotations

import torch
from torch import Tensor

from expander_sae.ops.reference import top_positions

CANDIDATES_PER_PICK = 8  # a row-disjoint round looks at this many features for each one it takes
_GROUP = 64  # features whose maximum is found before the place of the best one


def scores(correlations: Tensor, blocked: Tensor, signed: bool, floor: Tensor) -> Tensor:
    """``(B, n)``: what is maximised, ``|c|`` or signed ``c``; -1 where ``blocked`` or not above ``floor (B,) ≥ 0``."""
    score = correlations if signed else correlations.abs()
    return torch.where(blocked | ~(score > floor.unsqueeze(1)), -1.0, score)


def best(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest a sample, descending, ties to the lower index: scores and features, ``(B, count)``."""
    if count == 1:
        feature = _argmax(score)
        return score.gather(1, feature), feature
    position = top_positions(score, count)
    return score.gather(1, position), position


def _argmax(score: Tensor) -> Tensor:
    """``(B, 1)``: the first among equals, which ``max`` does not promise. ``argmax`` is slow on a CPU."""
    batch, n = score.shape
    if n % _GROUP:
        return score.argmax(dim=1, keepdim=True)
    groups = score.view(batch, n // _GROUP, _GROUP)
    group = groups.amax(dim=2).argmax(dim=1)
    inside = groups[torch.arange(batch, device=score.device), group].argmax(dim=1)
    return (group * _GROUP + inside).unsqueeze(1)


def best_disjoint(score: Tensor, count: int, support: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """``count`` features, best first, none of which shares a row with an earlier one (docs/theory.md S3).

    They are looked for among the ``8 · count`` best above ``floor (B,)``; where those hold fewer, the best of the
    others follow.
    """
    width = min(CANDIDATES_PER_PICK * count, score.shape[1])
    strength, candidates = best(score, width)
    rows = support[candidates].long()  # (B, C, d)
    taken = torch.zeros(score.shape[0], int(support.max()) + 1, dtype=torch.bool, device=score.device)
    accepted = torch.zeros_like(candidates, dtype=torch.bool)
    for place in range(width):
        clash = taken.gather(1, rows[:, place]).any(dim=1)
        take = ~clash & (accepted.sum(dim=1) < count) & (strength[:, place] > floor)
        accepted[:, place] = take
        taken.scatter_(1, rows[:, place], taken.gather(1, rows[:, place]) | take.unsqueeze(1))
    order = accepted.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :count]
    strength, candidates = strength.gather(1, order), candidates.gather(1, order)
    return strength, candidates
