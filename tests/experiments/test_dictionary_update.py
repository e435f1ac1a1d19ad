"""``reproduce dictionary-update`` on a tiny store."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.picture import points

from expander_sae.experiments import dictionary_update as experiment

SETTINGS = experiment.UpdateSettings(
    tokens=0, held_out=0, samples=200, adam_steps=(10, 40), batch_size=50, round_rows=(100, 200), rounds=(3, 2),
    polish_rows=300, degrees=(3,), d_sae=40, k=2,
)  # fmt: skip


def test_both_ways_of_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = experiment.run_dictionary_update(SETTINGS, tmp_path).rows
    methods = [row["method"] for row in rows]
    assert methods == [
        *["Adam", "Adam + exact"] * 2, *["exact, 100 in each round"] * 3, *["exact, 200 in each round"] * 2,
    ]  # fmt: skip
    assert [row["coded"] for row in rows] == [500, 800, 2000, 2300, 100, 200, 300, 200, 400]
    exact = [row for row in rows if row["method"] == "exact, 100 in each round"]
    assert [row["seconds"] for row in exact] == sorted(row["seconds"] for row in exact)
    for row in rows:
        assert 0 < row["omp_fvu"] <= row["fvu"] * 1.05
    adam, polished = rows[0], rows[1]
    assert polished["fvu"] < adam["fvu"]
    assert polished["seconds"] > adam["seconds"]
    assert exact[-1]["fvu"] < adam["fvu"]  # ten steps of Adam are no match
    monkeypatch.setattr(experiment, "train", lambda *args, **options: pytest.fail("trained again"))
    monkeypatch.setattr(experiment, "alternate", lambda *args, **options: pytest.fail("learned again"))
    assert experiment.run_dictionary_update(SETTINGS, tmp_path).rows == rows


def test_the_picture() -> None:
    rows = [
        {"degree": degree, "seed": 0, "method": method, "seconds": seconds, "fvu": degree / 100}
        for degree in (7, 3)
        for method, seconds in (("Adam", 1.0), ("Adam", 2.0), ("exact", 3.0))
    ]
    figure = experiment.plot_dictionary_update(rows, "Title")
    assert [axes.get_title() for axes in figure.axes] == ["d = 3", "d = 7"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"seconds of learning"}
    assert points(figure.axes[1]) == {"Adam": [[1, 0.07], [2, 0.07]], "exact": [[3, 0.07]]}
