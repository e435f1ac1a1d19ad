"""``reproduce amortisation``: its arms, both gaps, resuming, the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.picture import points

from expander_sae.evaluation import reconstruction
from expander_sae.experiments import amortisation
from expander_sae.experiments.common.subject import Subject
from expander_sae.sae import SAE

SETTINGS = amortisation.AmortisationSettings(
    tokens=0, windows=1, steps=20, batch_size=50, seeds=(0, 1), d_sae=48, k=3, degrees=(4,)
)


def test_arms() -> None:
    arms = amortisation.chosen_arms(32, replace(SETTINGS, dense_pursuit=True))
    kinds = ("", "-pursuit", "-pursuit-nonneg")
    assert list(arms) == [f"{name}{kind}" for name in ("expander-d4", "dense-n48", "dense-n6") for kind in kinds]
    assert arms["dense-n48"]["encoder"] == "untied"
    assert arms["dense-n48-pursuit"] == {"preset": "pursuit", "dictionary": "dense", "d_sae": 48, "k": 3}
    assert arms["expander-d4-pursuit-nonneg"] == {
        "preset": "pursuit",
        "encoder_options": {"nonnegative": True},
        "dictionary": "expander",
        "d_sae": 48,
        "degree": 4,
        "k": 3,
    }
    assert arms["dense-n6"]["d_sae"] * 32 == 4 * 48  # as many values as the expander
    fewer = amortisation.chosen_arms(32, SETTINGS)
    assert arms.keys() - fewer.keys() == {"dense-n48-pursuit", "dense-n48-pursuit-nonneg"}


def test_the_table_and_going_on(studied: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[str] = []

    def on_the_store(self: Subject, saes: dict[str, SAE], windows: int) -> list[dict[str, Any]]:
        evaluated.append(next(iter(saes)))
        rows = []
        for name, sae in saes.items():
            row = {"name": name, "encoder": sae.encoder.kind, "num_values": sae.num_values, "signed": sae.signed}
            for prefix, reader in (("", sae), ("omp_", sae.with_encoder("omp"))):
                found = reconstruction(reader, studied.activations(0))
                row |= {f"{prefix}relative_error": found.relative_error, f"{prefix}fvu": found.fvu}
                row |= {f"{prefix}ce_recovered": 1 - found.fvu}
            rows.append(row | {"tokens": 600, "train_seconds": 1.0})
        return rows

    monkeypatch.setattr(Subject, "evaluate", on_the_store)
    rows = {row["name"]: row for row in amortisation.run_amortisation(SETTINGS, tmp_path).rows}
    assert list(rows) == list(amortisation.chosen_arms(32, SETTINGS))
    assert len(evaluated) == 14
    assert [rows[name]["signed"] for name in ("expander-d4", "expander-d4-pursuit", "expander-d4-pursuit-nonneg")] == [
        False,
        True,
        False,
    ]
    plain = rows["expander-d4"]
    assert plain["runs"] == 2
    assert plain["gap"] > rows["expander-d4-pursuit"]["gap"]  # a pursuit has next to no gap
    assert plain["signed_gap"] != plain["gap"]
    # The signed OMP is the paper's, by hand on one of the SAEs.
    sae = SAE.from_pretrained(tmp_path / "expander-d4-seed0")
    own, signed = (
        reconstruction(one, studied.activations(0)).relative_error
        for one in (sae, sae.with_encoder("omp", signed=True))
    )
    cell = amortisation.Cells(tmp_path, amortisation.without_seeds(SETTINGS)).done["expander-d4-seed0"]["value"]
    assert cell["signed_omp_relative_error"] / cell["relative_error"] == pytest.approx(signed / own)

    assert {row["name"]: row for row in amortisation.run_amortisation(SETTINGS, tmp_path).rows} == rows
    assert len(evaluated) == 14
    # Another SAE in a folder is another result.
    sae.dictionary.values.data.mul_(1.01)
    sae.save_pretrained(tmp_path / "expander-d4-seed0")
    amortisation.run_amortisation(SETTINGS, tmp_path)
    assert evaluated[14:] == ["expander-d4"]


def test_the_picture() -> None:
    readings = {"": 0.5, "omp_": 0.4, "signed_omp_": 0.45}
    rows = [
        {"name": name}
        | {f"{key}relative_error": value for key, value in readings.items()}
        | {f"{key}ce_recovered": 1 - value for key, value in readings.items()}
        for name in ("a", "b")
    ]
    figure = amortisation.plot_amortisation(rows, "Title")
    error, ce = figure.axes
    assert error.get_xlabel() == "relative error (lower is better)"
    assert ce.get_xlabel() == "CE recovered (higher is better)"
    assert [label.get_text() for label in error.get_yticklabels()] == ["a", "b"]
    assert points(error) == {
        "own encoder": [[0.5, 0], [0.5, 1]],
        "OMP (magnitude)": [[0.4, 0], [0.4, 1]],
        "OMP (signed, the paper's)": [[0.45, 0], [0.45, 1]],
    }
    assert points(ce)["OMP (magnitude)"] == [[0.6, 0], [0.6, 1]]
