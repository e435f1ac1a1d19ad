"""The answer of ``reproduce controls`` in words, made from its rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from expander_sae.experiments.common.paired import holm, paired
from expander_sae.experiments.common.supports import REFERENCE
from expander_sae.theory import rank_correlation

QUESTIONS: dict[str, tuple[str, ...]] = {
    "More even or less overlapping supports than random ones (expansion)": ("balanced", "reed-solomon"),
    "Fewer, local or lopsided supports (diversity)": ("clustered", "shared", "banded", "hub"),
    "Columns of unequal degree": ("bernoulli",),
    "Supports chosen by the data": ("weighted", "learned"),
    "Another basis": ("random-basis", "pca-basis", "pca-basis-weighted"),
}
"""What each group of arms asks, in the words of the answer."""
SURE = 0.05


@dataclass(frozen=True)
class Change:
    """How an arm's FVU compares with the reference's under one preset.

    Attributes:
        share: mean relative change over degrees, ``-.1`` for a tenth less.
        least, most: the extremes over degrees, each a mean over seeds.
        p: of the paired t-test over seeds, corrected for the number of arms.
    """

    share: float
    least: float
    most: float
    p: float | None

    def __str__(self) -> str:
        least, most = (format(one, "+.1%") for one in (self.least, self.most))
        degrees = "" if least == most else f"{least} to {most}"
        p = "" if self.p is None else f"p {self.p:.3f}"
        within = ", ".join(one for one in (degrees, p) if one)
        return f"{self.share:+.1%}" + (f" ({within})" if within else "")


def changes(rows: Sequence[Mapping[str, Any]]) -> dict[str, Change]:
    """The change of every arm but the reference, from rows of one preset with ``by_seed``.

    For each seed the logarithms of the ratios are averaged over the degrees that the arm has; the test is over the
    seeds, which are what is independent.
    """
    found: dict[str, Change] = {}
    reference = {row["degree"]: row["by_seed"] for row in rows if row["name"] == REFERENCE}
    for name in dict.fromkeys(row["name"] for row in rows if row["name"] != REFERENCE):
        logs: dict[int, list[float]] = {}
        by_degree: list[float] = []
        for row in rows:
            if row["name"] != name:
                continue
            base = reference[row["degree"]]
            ratios = {int(s): math.log(one["fvu"] / base[s]["fvu"]) for s, one in row["by_seed"].items() if s in base}
            by_degree.append(statistics.fmean(ratios.values()))
            for seed, ratio in ratios.items():
                logs.setdefault(seed, []).append(ratio)
        means = {seed: statistics.fmean(ratios) for seed, ratios in logs.items()}
        test = paired(means, dict.fromkeys(means, 0.0))
        found[name] = Change(math.expm1(test.mean), math.expm1(min(by_degree)), math.expm1(max(by_degree)), test.p)
    corrected = holm([change.p for change in found.values()])
    return {name: replace(change, p=p) for (name, change), p in zip(found.items(), corrected, strict=True)}


def answer(rows: Sequence[Mapping[str, Any]]) -> str:
    """One paragraph: under each preset what each group of arms changes, what is sure of it, and which matters most."""
    said = []
    for preset in dict.fromkeys(row["preset"] for row in rows):
        of_preset = [row for row in rows if row["preset"] == preset]
        found = changes(of_preset)
        if found:
            said.append(f"With `{preset}`. {_of_one_preset(found)}{_rank_of_overlap(of_preset)}")
    if not said:
        return "There is no arm to compare with left-regular masks."
    return (
        "Change of FVU against left-regular masks, same seeds, mean over degrees (range over them; p over seeds, "
        f"corrected for the number of arms). {' '.join(said)}"
    )


def _of_one_preset(found: Mapping[str, Change]) -> str:
    parts, sizes = [], {}
    for question, names in QUESTIONS.items():
        there = {name: found[name] for name in names if name in found}
        if there:
            sizes[question] = max(abs(math.log1p(change.share)) for change in there.values())
            listed = ", ".join(f"{name} {change}" for name, change in there.items())
            parts.append(f"{question}: {listed}; {_verdict(there)}.")
    largest = max(sizes, key=sizes.__getitem__)
    return f"{' '.join(parts)} What changes most: {largest[0].lower()}{largest[1:]}."


def _verdict(group: Mapping[str, Change]) -> str:
    sure = [name for name, change in group.items() if change.p is not None and change.p < SURE]
    better = [name for name in sure if group[name].share < 0]
    worse = [name for name in sure if group[name].share > 0]
    said = [f"{' and '.join(names)} {word}" for names, word in ((better, "better"), (worse, "worse")) if names]
    return f"surely {', '.join(said)}" if said else "no change that these seeds make sure of"


def _rank_of_overlap(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether FVU follows the shared rows of two columns, among masks in the model's own coordinates."""
    inside = {REFERENCE, *(name for group in list(QUESTIONS)[:2] for name in QUESTIONS[group])}
    ranks = []
    for degree in dict.fromkeys(row["degree"] for row in rows):
        here = [row for row in rows if row["degree"] == degree and row["name"] in inside]
        if len(here) >= 4:
            shared, fvu = (torch.tensor([row[key] for row in here]).double() for key in ("overlap_mean", "fvu"))
            rank = rank_correlation(shared, fvu)
            ranks += [] if rank is None else [rank]
    if not ranks:
        return ""
    return (
        " Among regular masks that ask nothing of the data the rank correlation of FVU with the mean number of rows "
        f"two columns share is {', '.join(format(rank, '+.2f') for rank in ranks)} (one for each degree)."
    )
