"""Pair overlaps of a mask's columns: the sums that bound expansion, and the pairs that overlap most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from expander_sae.mask import Mask
from expander_sae.mask.structure import gram_blocks
from expander_sae.theory.rows import largest_partners


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
        stars[start : start + block.shape[0]] = largest_partners(block, start, partners, whole=True).cumsum(axis=1)
        place = np.flatnonzero(block.data >= threshold)
        row = start + np.searchsorted(block.indptr, place, side="right") - 1
        once = row < block.indices[place]
        pairs = np.stack([row[once], block.indices[place[once]]], axis=1).astype(np.int64)
        kept.append((pairs, block.data[place[once]].astype(np.int64)))
        while sum(len(shared) for _, shared in kept) > most_pairs:
            threshold += 1
            kept = [(pairs[shared >= threshold], shared[shared >= threshold]) for pairs, shared in kept]
    pairs = np.concatenate([pairs for pairs, _ in kept])
    return Overlaps(stars, pairs, np.concatenate([shared for _, shared in kept]), threshold)
