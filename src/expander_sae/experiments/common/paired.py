"""Comparisons of two arms over the same seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats


@dataclass(frozen=True)
class Paired:
    """Differences of an arm from a reference, one for each seed.

    Attributes:
        mean, sd: of the differences; ``sd`` is ``None`` for a single one.
        p: two-sided, of the paired t-test; ``None`` for a single seed, or where all differences are the same.
        seeds: how many.
    """

    mean: float
    sd: float | None
    p: float | None
    seeds: int


def paired(arm: Mapping[int, float], reference: Mapping[int, float]) -> Paired:
    """``arm - reference`` over the seeds that both have.

    Raises:
        ValueError: no seed in common.
    """
    seeds = sorted(arm.keys() & reference.keys())
    if not seeds:
        raise ValueError("there is no seed in common to compare")
    differences = [arm[seed] - reference[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    if len(seeds) < 2:
        return Paired(mean, None, None, len(seeds))
    sd = statistics.stdev(differences)
    if sd == 0:
        return Paired(mean, sd, None, len(seeds))
    test: Any = stats.ttest_1samp(differences, 0)
    return Paired(mean, sd, float(test.pvalue), len(seeds))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """P-values corrected for being several, step by step (Holm 1979); ``None`` stays and does not count."""
    known = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    least = 0.0
    for rank, (p, place) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        corrected[place] = least
    return corrected


def what_seeds_can_show(count: int) -> str:
    """What a paired test over ``count`` seeds can show, in a sentence."""
    if count < 2:
        return "A single seed: there is no test."
    needed = stats.t.ppf(0.975, count - 1) / count**0.5
    return (
        f"With {count} seeds the paired t-test ({count - 1} degrees of freedom) reaches p = .05 only where the mean "
        f"difference is {needed:.1f} times its deviation over seeds; a sign test could not go below "
        f"p = {2 ** (1 - count):g}."
    )
