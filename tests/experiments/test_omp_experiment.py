"""``reproduce omp`` on a tiny store: complete, resumable, and with figures that mean what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expander_sae.data import ActivationStore
from expander_sae.experiments import omp as experiment
from expander_sae.experiments.common.resume import Cells
from expander_sae.experiments.common.seeds import without_seeds
from expander_sae.pursuit import SOLVERS, omp
from expander_sae.sae import SAE

SETTINGS = experiment.OmpSettings(
    tokens=0, held_out=0, steps=15, batch_size=50, seeds=(0,), ks=(8,), degrees=(3,), d_sae=24, samples=10, few=2,
    seconds=0.0,
)  # fmt: skip


def test_every_reading_of_every_dictionary_then_another_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = experiment.run_omp(SETTINGS, tmp_path)
    rows, methods = finding.rows, experiment.METHODS
    assert {solver for choice in methods.values() if choice for solver in choice[:1]} == set(SOLVERS)
    assert [(row["name"], row["method"]) for row in rows] == [
        (name, method) for name in ("expander d=3", "dense") for method in methods
    ]
    for row in rows:
        refused = row["name"] == "dense" and (row["method"] in experiment.COMBINATORIAL or "disjoint" in row["method"])
        assert (row["relative_error"] is None) == refused, row
        if not refused:
            assert row["samples"] == (2 if row["method"] in experiment.COMBINATORIAL else 10)
            assert row["microseconds"] > 0
        # Other samples cannot be compared.
        assert (row["against_own"] is None) == (refused or row["samples"] != 10 or row["method"] == experiment.OWN)

    # Both OMPs are named, and the column says by how much they win.
    found = {row["method"]: row for row in rows if row["name"] == "expander d=3"}
    own, best, signed = (found[name] for name in (experiment.OWN, experiment.OMP, experiment.SIGNED_OMP))
    assert best["relative_error"] < own["relative_error"]
    assert best["relative_error"] != signed["relative_error"]
    assert best["against_own"] == pytest.approx(best["relative_error"] / own["relative_error"] - 1)
    assert (own["signed"], best["signed"], signed["signed"]) == (False, True, True)  # preset `modern` has a ReLU
    assert f"{-signed['against_own']:.1%} (expander d=3, k=8)" in finding.notes[1]

    # A seed may be added, and a cell that is lost is made again; nothing else is.
    key = "expander-d3-k8-seed0: OMP (magnitude)"
    cells = Cells(tmp_path, without_seeds(SETTINGS) | {"torch_threads": torch.get_num_threads()})
    expected = cells.done.pop(key)["value"]
    cells.save()
    read: list[str] = []
    real = experiment.read
    monkeypatch.setattr(experiment, "read", lambda sae, method, *rest: read.append(method) or real(sae, method, *rest))
    more = experiment.run_omp(replace(SETTINGS, seeds=(0, 1)), tmp_path).rows
    assert len(read) == 1 + 2 * len(methods)
    assert {row["runs"] for row in more} == {2}
    assert all(row["relative_error_sd"] is not None for row in more if row["relative_error"] is not None)
    again = Cells(tmp_path, cells.settings).done[key]["value"]
    assert again["relative_error"] == pytest.approx(expected["relative_error"])


def test_the_error_of_a_reading(tiny_store: ActivationStore) -> None:
    sae = SAE.dense(32, 48, k=3)
    with torch.no_grad():
        sae.b_dec.copy_(torch.arange(32.0))
    h = tiny_store.sample(30, 1)
    for name, options in ((experiment.OMP, {}), (experiment.SIGNED_OMP, {"signed": True})):
        found = experiment.read(sae, name, h, 0.0)
        code = omp(h, sae.dictionary, 3, b_dec=sae.b_dec, **options)
        assert found["relative_error"] == pytest.approx(float((code.residual_norms / h.norm(dim=1)).mean()), rel=1e-4)
    refused = experiment.read(SAE.dense(32, 48, k=8), "OMP, disjoint 8", h, 0.0)
    assert "expander" in refused["not_applicable"]
    assert refused["relative_error"] is None


def test_the_picture_shows_whole_readings_only() -> None:
    rows = [
        {"name": name, "k": k, "method": method, "relative_error": 0.1 * k, "microseconds": 5.0, "samples": samples}
        for name in ("a", "b")
        for k in (2, 3)
        for method, samples in ((experiment.OMP, 9), ("iht", 9), ("smp", 1))
    ]
    figure = experiment.plot_omp(rows, "Title")
    assert [axes.get_title() for axes in figure.axes] == ["a, k = 2", "b, k = 2", "a, k = 3", "b, k = 3"]
    for axes in figure.axes:
        assert len(axes.containers) == 2
    assert {axes.get_xlabel() for axes in figure.axes} == {"", "microseconds per sample"}
    assert figure.axes[2].containers[0].lines[0].get_xydata().tolist() == [[5.0, pytest.approx(0.3)]]
    (legend,) = figure.legends
    assert [entry.get_text() for entry in legend.get_texts()] == [experiment.OMP, "iht"]
