"""``reproduce amortisation``: its arms, resuming, and the gap; the language model is a stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expander_sae.data import ActivationStore
from expander_sae.evaluation import reconstruction
from expander_sae.experiments import amortisation
from expander_sae.sae import SAE

SIZE = amortisation.AmortisationSize(
    tokens=0, windows=1, steps=30, batch_size=50, seeds=(0, 1), d_sae=32, k=3, degrees=(3,)
)


def test_arms() -> None:
    arms = amortisation.amortisation_arms(16, SIZE)
    assert list(arms) == [
        "expander-d3", "expander-d3-pursuit", "dense-n32", "dense-n32-pursuit", "dense-n6", "dense-n6-pursuit",
    ]  # fmt: skip
    assert arms["dense-n32"]["encoder"] == "untied"
    assert arms["dense-n32-pursuit"] == {"preset": "pursuit", "dictionary": "dense", "d_sae": 32, "k": 3}
    assert arms["expander-d3-pursuit"] == {
        "preset": "pursuit",
        "dictionary": "expander",
        "d_sae": 32,
        "degree": 3,
        "k": 3,
    }
    assert arms["dense-n6"]["d_sae"] * 16 == 3 * 32  # as many values as the expander
    from dataclasses import replace

    assert "dense-n32-pursuit" not in amortisation.amortisation_arms(16, replace(SIZE, dense_pursuit=False))


@pytest.fixture
def stand_ins(tiny_store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    evaluated: list[str] = []

    class Model:
        tokenizer = None

    def rows(saes: dict[str, SAE], lm: Any, windows: list, layer: int) -> list[dict[str, Any]]:
        ((name, sae),) = saes.items()
        evaluated.append(name)
        own, best = reconstruction(sae, tiny_store), reconstruction(sae.with_encoder("omp"), tiny_store)
        figures = {
            "relative_error": own.relative_error,
            "fvu": own.fvu,
            "ce_recovered": 1 - own.fvu,
            "tokens": own.tokens,
        }
        figures |= {"omp_relative_error": best.relative_error, "omp_fvu": best.fvu, "omp_ce_recovered": 1 - best.fvu}
        facts = {"name": name, "encoder": sae.encoder.kind, "num_values": sae.num_values}
        return [facts | figures | {"train_seconds": sae.metadata["training"]["seconds"]}]

    monkeypatch.setattr(amortisation, "activations", lambda tokens: tiny_store)
    monkeypatch.setattr(amortisation, "evaluation_rows", rows)
    monkeypatch.setattr(amortisation.language, "load_model", lambda name: Model())
    monkeypatch.setattr(amortisation.language, "sample_windows", lambda *args: [])
    return evaluated


def test_the_table_and_going_on(stand_ins: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = amortisation.run_amortisation(tmp_path, SIZE)
    assert [row["name"] for row in rows] == list(amortisation.amortisation_arms(16, SIZE))
    assert len(stand_ins) == 12
    encoders = {row["name"]: row["encoder"] for row in rows}
    assert encoders["expander-d3"] == "tied"
    assert encoders["dense-n32"] == "untied"
    assert encoders["dense-n6-pursuit"] == "matching-pursuit"
    saved = json.loads((tmp_path / "cells.json").read_text())["cells"]
    for row in rows:
        assert row["runs"] == 2
        gaps = [
            1
            - saved[f"{row['name']}-seed{seed}"]["omp_relative_error"]
            / saved[f"{row['name']}-seed{seed}"]["relative_error"]
            for seed in (0, 1)
        ]
        assert row["gap"] == pytest.approx(sum(gaps) / 2)
    by_name = {row["name"]: row for row in rows}
    assert by_name["expander-d3"]["gap"] > by_name["expander-d3-pursuit"]["gap"]  # a pursuit has next to no gap
    assert (tmp_path / "amortisation.png").stat().st_size > 0
    assert "± " in (tmp_path / "results.md").read_text()

    monkeypatch.setattr(amortisation.language, "load_model", lambda name: pytest.fail("loaded for nothing"))
    assert amortisation.run_amortisation(tmp_path, SIZE) == rows
    assert len(stand_ins) == 12
