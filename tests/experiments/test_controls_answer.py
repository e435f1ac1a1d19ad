"""The answer in words follows the numbers."""

from __future__ import annotations

from typing import Any

import pytest

from expander_sae.experiments.common.answer import QUESTIONS, answer, changes
from expander_sae.experiments.common.supports import ARMS, REFERENCE

NOISE = (0.999, 1.0, 1.001)  # of the seeds, over all arms
OWN = {
    "balanced": (1.0005, 0.9994, 1.0),
    "clustered": (1.0, 1.001, 0.999),
    "hub": (1.001, 1.0, 1.0),
    "pca-basis": (1.0, 1.0, 1.0008),
}  # what an arm does beside its effect


def rows(
    effects: dict[str, float], places: tuple[tuple[str, int], ...] = (("p", 7), ("q", 30))
) -> list[dict[str, Any]]:
    made = []
    for place, (preset, degree) in enumerate(places):
        for name, effect in {REFERENCE: 1.0, **effects}.items():
            own = OWN.get(name, (1.0, 1.0003, 0.9997))
            fvu = [0.3 * (place + 1) * noise * effect * one for noise, one in zip(NOISE, own, strict=True)]
            by_seed = {str(seed): {"fvu": value} for seed, value in enumerate(fvu)}
            row = {"name": name, "preset": preset, "degree": degree, "by_seed": by_seed, "fvu": sum(fvu) / 3}
            made.append(row | {"overlap_mean": effect})
    return made


def test_every_arm_is_in_one_question() -> None:
    named = [name for names in QUESTIONS.values() for name in names]
    assert sorted([*named, REFERENCE]) == sorted(ARMS)


def test_changes_are_ratios_over_places_and_seeds() -> None:
    table = rows({"clustered": 1.2})
    for row in table:
        if (row["name"], row["degree"]) == ("clustered", 30):
            row["by_seed"] = {seed: {"fvu": 2 * one["fvu"]} for seed, one in row["by_seed"].items()}
    found = changes(table)["clustered"]
    assert found.share == pytest.approx(1.2 * 2**0.5 - 1, rel=1e-3)
    assert (found.least, found.most) == (pytest.approx(0.2, rel=0.01), pytest.approx(1.4, rel=0.01))
    assert found.p is not None
    assert found.p < 1e-4
    several = changes(rows({"clustered": 1.2, "balanced": 1.0, "hub": 1.0}))
    assert several["clustered"].p == pytest.approx(3 * changes(rows({"clustered": 1.2}))["clustered"].p, rel=1e-6)  # type: ignore[operator]


def test_the_words_say_what_is_sure() -> None:
    said = answer(rows({"balanced": 1.0, "clustered": 1.3, "hub": 0.9, "pca-basis": 0.7}))
    assert "no change that these seeds make sure of" in said[: said.index("Fewer")]
    assert "surely hub better, clustered worse" in said[said.index("Fewer") : said.index("Another")]
    assert "pca-basis -30.0% (-30.0% to -30.0%, p 0.0" in said
    assert "surely pca-basis better" in said
    ranking = said[said.index("By the largest change in each group") :]
    assert ranking.index("another basis") < ranking.index("fewer, local") < ranking.index("more even")
    assert "Supports chosen by the data" not in said, "no such arm was run"


def test_overlap_and_error_are_ranked_within_masks_that_ask_nothing_of_the_data() -> None:
    said = answer(rows({"balanced": 1.01, "clustered": 1.3, "hub": 1.1, "pca-basis": 0.7}))
    assert "is +1.00 (+1.00 to +1.00" in said
    assert "rank correlation" not in answer(rows({"balanced": 1.01}))


def test_without_another_arm_there_is_no_answer() -> None:
    assert answer(rows({})) == "There is no arm to compare with left-regular masks."
