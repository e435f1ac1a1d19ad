"""The answer in words follows the numbers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from expander_sae.experiments.common.answer import QUESTIONS, answer, changes
from expander_sae.experiments.common.supports import ARMS, REFERENCE

NOISE = (0.999, 1.0, 1.001)  # of the seeds, over all arms
# What an arm does beside its effect: equal differences could not be tested.
OWN = {
    "balanced": (1.0005, 0.9994, 1.0),
    "clustered": (1.0, 1.001, 0.999),
    "hub": (1.001, 1.0, 1.0),
    "pca-basis": (1.0, 1.0, 1.0008),
}


def rows(effects: dict[str, float], preset: str = "p", degrees: tuple[int, ...] = (7, 30)) -> list[dict[str, Any]]:
    made = []
    for degree in degrees:
        for name, effect in {REFERENCE: 1.0, **effects}.items():
            own = OWN.get(name, (1.0, 1.0, 1.0))
            fvu = [degree / 100 * noise * effect * one for noise, one in zip(NOISE, own, strict=True)]
            by_seed = {str(seed): {"fvu": value} for seed, value in enumerate(fvu)}
            row = {"name": name, "preset": preset, "degree": degree, "by_seed": by_seed, "fvu": sum(fvu) / 3}
            made.append(row | {"overlap_mean": effect})
    return made


def test_every_arm_is_in_one_question() -> None:
    named = [name for names in QUESTIONS.values() for name in names]
    assert sorted([*named, REFERENCE]) == sorted(ARMS)


def test_changes_are_ratios_over_degrees_and_seeds() -> None:
    table = rows({"clustered": 1.2})
    for row in table:
        if (row["name"], row["degree"]) == ("clustered", 30):
            row["by_seed"] = {seed: {"fvu": 2 * one["fvu"]} for seed, one in row["by_seed"].items()}
    found = changes(table)["clustered"]
    assert found.share == pytest.approx(1.2 * 2**0.5 - 1, rel=1e-3)
    assert (found.least, found.most) == (pytest.approx(0.2, rel=0.01), pytest.approx(1.4, rel=0.01))
    assert found.p is not None
    assert found.p < 1e-4
    alone = changes(rows({"clustered": 1.2}))["clustered"].p
    assert alone is not None
    several = changes(rows({"clustered": 1.2, "balanced": 1.0, "hub": 1.0}))
    assert several["clustered"].p == pytest.approx(3 * alone, rel=1e-6), "corrected for three arms"


def test_the_words_say_what_is_sure() -> None:
    said = answer(rows({"balanced": 1.0, "clustered": 1.3, "hub": 0.9, "pca-basis": 0.7}))
    expansion, diversity = said[: said.index("Fewer")], said[said.index("Fewer") : said.index("Another")]
    assert "balanced" in expansion
    assert "no change that these seeds make sure of" in expansion
    assert "surely hub better, clustered worse" in diversity
    assert re.search(r"pca-basis -30.0% \(p 0.00\d\); surely pca-basis better", said)
    assert "What changes most: another basis." in said
    assert "Supports chosen by the data" not in said, "no such arm was run"


def test_presets_are_not_averaged() -> None:
    both = rows({"pca-basis": 0.7}) + rows({"pca-basis": 1.5}, "q", (7,))
    said = answer(both)
    first, second = said[said.index("With `p`.") : said.index("With `q`.")], said[said.index("With `q`.") :]
    assert "-30.0%" in first
    assert "surely pca-basis better" in first
    assert re.search(r"\+50.0% \(p 0.00\d\); surely pca-basis worse", second)


def test_overlap_and_error_are_ranked_within_masks_that_ask_nothing_of_the_data() -> None:
    said = answer(rows({"balanced": 1.01, "clustered": 1.3, "hub": 1.1, "pca-basis": 0.7}))
    assert "is +1.00, +1.00 (one for each degree)" in said
    assert "rank correlation" not in answer(rows({"balanced": 1.01}))


def test_without_another_arm_there_is_no_answer() -> None:
    assert answer(rows({})) == "There is no arm to compare with left-regular masks."
