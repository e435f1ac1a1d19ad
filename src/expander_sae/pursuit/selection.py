"""Which features a round takes: the best, the best ``L``, or ``L`` whose columns share no row."""

from __future__ import annotations

import torch
from torch import Tensor

from expander_sae.dictionary import ExpanderMatrix, Matrix
from expander_sae.ops.reference import top_positions

_CANDIDATES_A_PICK = 8  # row-disjoint picks are nearly always found among this many candidates each


def scores(correlations: Tensor, blocked: Tensor, signed: bool) -> Tensor:
    """``(B, n)``: what is maximised, ``|c|`` or signed ``c``; -1 where ``blocked``. No useful score is below 0."""
    return (correlations if signed else correlations.abs()).masked_fill(blocked, -1.0)


def best(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest a sample, descending, ties to the lower index: scores and features, ``(B, count)``."""
    if count == 1:
        feature = score.argmax(dim=1, keepdim=True)  # promises the first among equals, torch.max does not
        return score.gather(1, feature), feature
    position = top_positions(score, count)
    return score.gather(1, position), position


def best_disjoint(score: Tensor, count: int, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """``count`` features, best first, none of which shares a row with an earlier one (THEORY C.3, C.12 e).

    Where fewer than ``count`` such features exist, the best of the others follow.

    Raises:
        ValueError: the matrix has no supports to keep apart.
    """
    if not isinstance(matrix, ExpanderMatrix):
        raise ValueError("disjoint=True keeps the rows of a round's columns apart: it needs an expander dictionary")
    width = min(_CANDIDATES_A_PICK * count, matrix.d_sae)
    strength, candidates = best(score, width)
    rows = matrix.rows[candidates].long()  # (B, C, d)
    taken = torch.zeros(score.shape[0], matrix.d_in, dtype=torch.bool, device=score.device)
    accepted = torch.zeros_like(candidates, dtype=torch.bool)
    for place in range(width):
        clash = taken.gather(1, rows[:, place]).any(dim=1)
        take = ~clash & (accepted.sum(dim=1) < count) & (strength[:, place] > 0)
        accepted[:, place] = take
        taken.scatter_(1, rows[:, place], taken.gather(1, rows[:, place]) | take.unsqueeze(1))
    order = accepted.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :count]
    strength, candidates = strength.gather(1, order), candidates.gather(1, order)
    short = (accepted.sum(dim=1) < count).nonzero().squeeze(1)
    if short.numel() and width < matrix.d_sae:
        strength[short], candidates[short] = _disjoint_from_all(score[short], count, matrix)
    return strength, candidates


def _disjoint_from_all(score: Tensor, count: int, matrix: ExpanderMatrix) -> tuple[Tensor, Tensor]:
    """The same choice over all ``n`` features: one argmax a pick, columns that touch a taken row masked."""
    left = score.clone()
    rejected = torch.zeros_like(score, dtype=torch.bool)
    picks = []
    rows = matrix.rows.long()
    for _ in range(count):
        free = left.masked_fill(rejected, -1.0)
        none_free = free.amax(dim=1, keepdim=True) <= 0
        pick = torch.where(none_free, left, free).argmax(dim=1, keepdim=True)
        picks.append(pick)
        left.scatter_(1, pick, -1.0)
        touched = torch.zeros(score.shape[0], matrix.d_in, dtype=torch.bool, device=score.device)
        touched.scatter_(1, rows[pick.squeeze(1)], ~none_free.expand(-1, rows.shape[1]))
        for t in range(rows.shape[1]):
            rejected |= touched[:, rows[:, t]]
    features = torch.cat(picks, dim=1)
    return score.gather(1, features), features
