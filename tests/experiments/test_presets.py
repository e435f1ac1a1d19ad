"""``reproduce presets``: the same activations for every preset, means over seeds, the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.picture import points

from expander_sae.experiments import presets
from expander_sae.sae import SAE
from expander_sae.training import TrainingDiverged
from expander_sae.training.recipe import PRESETS

SETTINGS = presets.PresetSettings(
    tokens=0, trained=3000, windows=1, degree=4, d_sae=40, k=3, seeds=(0, 1), presets=("paper", "pursuit")
)


def test_every_preset_sees_the_same_number_of_activations(tmp_path: Path) -> None:
    finding = presets.run_presets(SETTINGS, tmp_path)
    rows = {row["preset"]: row for row in finding.rows}
    assert list(rows) == ["paper", "pursuit"]
    assert (rows["paper"]["steps"], rows["paper"]["batch_size"]) == (11, 256)
    assert (rows["pursuit"]["steps"], rows["pursuit"]["batch_size"]) == (5, 600)  # there are no more rows
    for preset, row in rows.items():
        assert row["runs"] == 2
        seen = [SAE.from_pretrained(tmp_path / f"{preset}-seed{seed}").metadata["training"] for seed in (0, 1)]
        assert {one["tokens_seen"] for one in seen} == {row["steps"] * row["batch_size"]}
        assert row["dead"] == pytest.approx(sum(one["dead"] for one in seen) / 2)
        assert row["fvu_sd"] > 0
    assert "the convention ours" in finding.notes[0]
    more = presets.run_presets(replace(SETTINGS, presets=("paper", "pursuit", "modern")), tmp_path).rows
    assert more[:2] == finding.rows
    assert set(presets.PresetSettings().presets) <= set(PRESETS)


def test_a_training_that_diverges_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = presets.trained

    def fails(name: str, *rest: Any) -> SAE:
        if name.startswith("paper") or name == "pursuit-seed0":
            raise TrainingDiverged("too steep")
        return real(name, *rest)

    monkeypatch.setattr(presets, "trained", fails)
    finding = presets.run_presets(SETTINGS, tmp_path)
    paper, pursuit = finding.rows
    assert (paper["fvu"], paper["diverged"], paper["signed"]) == (None, 2, True)
    assert (pursuit["diverged"], pursuit["fvu_sd"]) == (1, None)
    assert pursuit["fvu"] is not None
    assert "left out of the figures: 2 of 2 of paper, 1 of 2 of pursuit." in finding.notes[0]
    assert list(points(presets.plot_presets(finding.rows, "Title").axes[0])) == ["pursuit"]
    with pytest.raises(ValueError, match="every training diverged"):
        presets.run_presets(replace(SETTINGS, presets=("paper",), seeds=(0,)), tmp_path)


def test_the_picture() -> None:
    row = {"preset": "a", "train_seconds": 2.0, "fvu": 0.5, "omp_fvu": 0.4}
    (axes,) = presets.plot_presets([row, row | {"preset": "b", "fvu": 0.3}], "Title").axes
    found = points(axes)
    assert found["a"] == [[2.0, 0.5]]
    assert found["b"] == [[2.0, 0.3]]
