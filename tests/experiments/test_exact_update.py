"""``reproduce dictionary-update`` on a tiny store."""

from __future__ import annotations

from pathlib import Path

import pytest

from expander_sae.data import ActivationStore
from expander_sae.experiments import exact_update

SIZE = exact_update.UpdateSize(
    tokens=0, held_out=0, samples=200, adam_steps=(10, 40), batch_size=50, round_rows=(100, 200), rounds=(3, 2),
    polish_rows=300, degrees=(3,), d_sae=24, k=2,
)  # fmt: skip


def test_both_ways_of_learning(tiny_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_update, "activations", lambda tokens, split="train": tiny_store)
    rows = exact_update.run_dictionary_update(tmp_path, SIZE)
    methods = [row["method"] for row in rows]
    assert methods == ["Adam", "Adam + exact"] * 2 + ["exact, 100 a round"] * 3 + ["exact, 200 a round"] * 2
    assert [row["coded"] for row in rows] == [500, 800, 2000, 2300, 100, 200, 300, 200, 400]
    exact = [row for row in rows if row["method"] == "exact, 100 a round"]
    assert [row["seconds"] for row in exact] == sorted(row["seconds"] for row in exact)
    for row in rows:
        assert 0 < row["omp_fvu"] <= row["fvu"] * 1.05
    adam, polished = rows[0], rows[1]
    assert polished["fvu"] < adam["fvu"]
    assert polished["seconds"] > adam["seconds"]
    assert exact[-1]["fvu"] < adam["fvu"]  # ten steps of Adam are no match
    assert (tmp_path / "dictionary-update.png").stat().st_size > 0
    monkeypatch.setattr(exact_update, "train", lambda *args, **options: pytest.fail("trained again"))
    monkeypatch.setattr(exact_update, "alternate", lambda *args, **options: pytest.fail("learned again"))
    assert exact_update.run_dictionary_update(tmp_path, SIZE) == rows
