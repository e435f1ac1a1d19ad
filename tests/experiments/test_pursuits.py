"""``reproduce omp`` on a tiny store: complete, resumable, and with figures that mean what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expander_sae.data import ActivationStore
from expander_sae.experiments import pursuits
from expander_sae.pursuit import SOLVERS, omp
from expander_sae.sae import SAE

SIZE = pursuits.PursuitsSize(
    tokens=0, held_out=0, steps=30, batch_size=50, seeds=(0, 1), ks=(8, 9), degrees=(3,), d_sae=24, samples=20, few=3
)


@pytest.fixture(scope="module", autouse=True)
def _one_call_a_reading():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pursuits, "SECONDS_TIMED", 0.0)
        yield


@pytest.fixture(scope="module")
def finished(tiny_store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("omp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pursuits, "activations", lambda tokens, split="train": tiny_store)
        return out, pursuits.run_pursuits(out, SIZE)


def test_every_reading_of_every_dictionary_over_seeds(finished: tuple[Path, list[dict]]) -> None:
    out, rows = finished
    assert {(row["name"], row["k"]) for row in rows} == {
        (name, k) for name in ("expander d=3", "dense") for k in (8, 9)
    }
    assert {row["method"] for row in rows} == set(pursuits.METHODS) >= set(SOLVERS)
    assert len(rows) == 4 * len(pursuits.METHODS)
    assert {row["runs"] for row in rows} == {2}
    for row in rows:
        refused = row["name"] == "dense" and (row["method"] in pursuits.COMBINATORIAL or "disjoint" in row["method"])
        assert (row["relative_error"] is None) == refused, row
        if not refused:
            assert row["samples"] == (3 if row["method"] in pursuits.COMBINATORIAL else 20)
            assert row["relative_error_sd"] is not None
            assert row["microseconds"] > 0
        # Other samples cannot be compared.
        assert (row["against_own"] is None) == (refused or row["samples"] != 20 or row["method"] == pursuits.OWN)
    for name in ("results.json", "results.md", "solvers.png", "cells.json"):
        assert (out / name).stat().st_size > 0
    assert len(list(out.glob("*/config.json"))) == 8


def test_omp_beats_the_encoder_and_the_column_says_by_how_much(finished: tuple[Path, list[dict]]) -> None:
    _, rows = finished
    by_method = {row["method"]: row for row in rows if row["name"] == "expander d=3" and row["k"] == 9}
    own, best = by_method[pursuits.OWN], by_method["omp"]
    assert best["relative_error"] < own["relative_error"]
    assert best["against_own"] == pytest.approx(best["relative_error"] / own["relative_error"] - 1)
    assert own["against_own"] is None


def test_again_nothing_is_done_twice(
    finished: tuple[Path, list[dict]], tiny_store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rows = finished
    monkeypatch.setattr(pursuits, "activations", lambda tokens, split="train": tiny_store)
    monkeypatch.setattr(pursuits, "trained", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(pursuits, "read", lambda *args: pytest.fail("read again"))
    assert pursuits.run_pursuits(out, SIZE) == rows
    assert json.loads((out / "results.json").read_text())["rows"] == rows


def test_a_seed_may_be_added(
    finished: tuple[Path, list[dict]], tiny_store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    monkeypatch.setattr(pursuits, "activations", lambda tokens, split="train": tiny_store)
    names: list[str] = []
    real = pursuits.trained
    monkeypatch.setattr(pursuits, "trained", lambda name, *rest: names.append(name) or real(name, *rest))
    more = pursuits.run_pursuits(out, replace(SIZE, seeds=(0, 1, 2)))
    assert len(names) == 4
    assert all(name.endswith("seed2") for name in names)
    assert {row["runs"] for row in more} == {3}


def test_a_cut_run_goes_on(
    finished: tuple[Path, list[dict]], tiny_store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rows = finished
    path = out / "cells.json"
    saved = json.loads(path.read_text())
    missing = "expander-d3-k8-seed1: omp"
    expected = saved["cells"].pop(missing)
    path.write_text(json.dumps(saved))
    monkeypatch.setattr(pursuits, "activations", lambda tokens, split="train": tiny_store)
    again = pursuits.run_pursuits(out, SIZE)
    assert json.loads(path.read_text())["cells"][missing]["relative_error"] == pytest.approx(expected["relative_error"])
    assert [row["method"] for row in again] == [row["method"] for row in rows]


def test_the_error_of_a_reading(tiny_store: ActivationStore) -> None:
    sae = SAE.dense(16, 24, k=3)
    with torch.no_grad():
        sae.b_dec.copy_(torch.arange(16.0))
    h = tiny_store.sample(30, 1)
    found = pursuits.read(sae, "omp", h)
    code = omp(h, sae.dictionary, 3, b_dec=sae.b_dec)
    assert found["relative_error"] == pytest.approx(float((code.residual_norms / h.norm(dim=1)).mean()), rel=1e-4)
    refused = pursuits.read(SAE.dense(16, 24, k=8), "omp, disjoint 8", h)
    assert "needs an expander dictionary" in refused["not_applicable"]
    assert refused["relative_error"] is None
