"""Pair overlaps of a mask's columns: the sums that bound expansion, and the pairs that overlap most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from expander_sae.mask import Mask
from expander_sae.mask.structure import gram_blocks
from expander_sae.theory.rows import entries_from, largest_partners


@dataclass(frozen=True)
class Overlaps:
    """What one pass over the overlap matrix leaves.

    Attributes:
        stars: int64 ``(n, t)``: ``stars[j, s - 1]`` is the sum of the ``s`` largest overlaps of column ``j`` with
            others.
        pairs: int64 ``(p, 2)``, ascending: the pairs that share at least ``threshold`` rows.
        shared: int64 ``(p,)``, how many rows they share.
        threshold: at least the one asked for; more where there would have been too many pairs.
    """

    stars: np.ndarray
    pairs: np.ndarray
    shared: np.ndarray
    threshold: int

    @property
    def maximum(self) -> int:
        """``a``: the most rows two columns share."""
        return int(self.stars[:, 0].max(initial=0))


def overlaps(mask: Mask, partners: int, threshold: int, most_pairs: int) -> Overlaps:
    """Overlaps of all pairs of columns, exact, in bounded memory.

    Args:
        mask: the supports.
        partners: sums of up to so many overlaps per column are kept.
        threshold: pairs that share so many rows are listed, at least 1.
        most_pairs: beyond so many the threshold is raised.
    """
    ones = torch.ones(mask.rows.shape, dtype=torch.float64)
    stars = np.zeros((mask.d_sae, partners), dtype=np.int64)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    threshold = max(1, threshold)
    for start, block in gram_blocks(mask.rows, ones, mask.d_in):
        found = largest_partners(block, start, partners, whole=True)
        stars[start : start + len(found)] = found.cumsum(axis=1)
        row, column, shared = entries_from(block, threshold)
        once = row + start < column
        pairs = np.stack([row[once] + start, column[once]], axis=1)
        kept.append((pairs, shared[once].astype(np.int64)))
        while sum(len(shared) for _, shared in kept) > most_pairs:
            threshold += 1
            kept = [(pairs[shared >= threshold], shared[shared >= threshold]) for pairs, shared in kept]
    pairs = np.concatenate([pairs for pairs, _ in kept])
    return Overlaps(stars, pairs, np.concatenate([shared for _, shared in kept]), threshold)
