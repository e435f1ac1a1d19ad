"""``reproduce controls``: runs, refusals, the paired changes, the bases read in the model, the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.picture import points

from expander_sae.data import ActivationStore
from expander_sae.evaluation import reconstruction
from expander_sae.experiments import controls
from expander_sae.experiments.common.subject import Subject
from expander_sae.experiments.common.supports import ARMS, Supports, mask_of
from expander_sae.sae import SAE

SETTINGS = replace(controls.SMOKE, arms=("left-regular", "clustered"), seeds=(0, 1))


def test_settings() -> None:
    every = controls.LAPTOP.runs()
    assert ("pursuit", 30, "hub") in every
    assert ("pursuit", 100, "hub") not in every
    assert ("paper-stable", 100, "hub") in every
    assert ("pursuit", 100, "learned") in every
    with pytest.raises(ValueError, match="unknown arm 'hubb'; did you mean 'hub'"):
        replace(SETTINGS, arms=("left-regular", "hubb"))
    with pytest.raises(ValueError, match="must name 'left-regular'"):
        replace(SETTINGS, arms=("hub",))
    with pytest.raises(ValueError, match="same presets"):
        replace(SETTINGS, steps={"pursuit": 3})


def test_arms_may_be_added_to_a_finished_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def figures(subject: Subject, sae: SAE, windows: int) -> dict[str, Any]:
        recipe, preset = mask_of(sae).recipe, "paper-stable" if sae.encoder.kind == "tied" else "pursuit"
        assert recipe is not None
        measured.append(f"{recipe.kind} {preset} {recipe.seed}")
        fvu = 0.5 + 0.1 * recipe.seed + (0.05 + 0.001 * recipe.seed) * (recipe.kind == "clustered")
        return {"fvu": fvu, "ce_recovered": 1 - fvu, "tokens": 11, "overlap_mean": 1.0}

    monkeypatch.setattr(controls, "measure", figures)
    rows = controls.run_controls(SETTINGS, tmp_path).rows
    assert len(measured) == 8
    clustered = next(row for row in rows if row["name"] == "clustered")
    assert clustered["runs"] == 2
    assert clustered["fvu_against"] == pytest.approx((0.05 + 0.051) / 2 / 0.55)
    assert clustered["ce_recovered_against"] == pytest.approx(-0.0505)
    assert clustered["fvu_p"] < 0.01
    assert "fvu_against" not in rows[0]
    assert [row for row in rows if row.get("published")], "the paper's rows stand below"

    measured.clear()
    # No overlap-bounded mask of 32 rows has 20 in a column.
    more = controls.run_controls(replace(SETTINGS, arms=("left-regular", "clustered", "hub")), tmp_path)
    assert measured == [f"hub {preset} {seed}" for preset in SETTINGS.steps for seed in (0, 1)]
    none = controls.run_controls(replace(SETTINGS, arms=("left-regular", "reed-solomon"), degrees=(20,)), tmp_path)
    assert {row["name"] for row in none.rows if not row.get("published")} == {"left-regular"}
    assert any(note.startswith("Not to be had: reed-solomon at d = 20:") for note in none.notes)
    assert not any(note.startswith("Not to be had") for note in more.notes)


def test_the_basis_of_an_arm_is_part_of_its_sae(studied: Subject, tiny_store: ActivationStore, tmp_path: Path) -> None:
    supports = Supports(tiny_store, tmp_path, 48, 3, {"pursuit": {"steps": 30, "batch_size": 50}})
    sae = supports.sae("a", ARMS["random-basis"], "pursuit", 3, 0)
    row = controls.measure(studied, sae, 2)
    assert row["tokens"] == 2 * 11
    assert row["num_values"] == 3 * 48 + tiny_store.d_in**2
    assert row["overlap_max"] <= 3
    inside = reconstruction(sae, tiny_store).fvu
    assert sae.leave_basis_() is not None
    assert inside < 0.8 * reconstruction(sae, tiny_store).fvu, "it reads in its basis"
    plain = studied.read({"": sae}, 2)[""].reconstruction
    assert row["fvu"] != pytest.approx(plain.fvu, rel=1e-5), "in the model, too"


def test_the_picture() -> None:
    rows = [
        {"name": name, "preset": "p", "degree": d, "fvu": 0.1 * d, "signed_omp_fvu": 0.05 * d, "fvu_sd": None}
        for d in (1, 2)
        for name in ("left-regular", "hub")
    ]
    figure = controls.plot_controls([*rows, {"name": "theirs", "published": True}], "Title")
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["left-regular", "hub"]
    assert second.get_title() == "p, d = 2"
    assert points(second)["own encoder"][0] == [pytest.approx(0.2), 0]
