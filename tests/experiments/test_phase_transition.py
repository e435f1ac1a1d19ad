"""The phase transition: planted problems, intervals, the fit, resuming, and maps that are known in advance."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from support.picture import points

from expander_sae.experiments import phase_transition as pt
from expander_sae.report.phase import plot_phase_transition

SMALL = pt.PhaseSettings(n=80, deltas=2, max_rho=0.8, rhos=4, trials=6, draws=2, degree=4)


@pytest.mark.parametrize("mask", ["left-regular", "balanced", "dense"])
@pytest.mark.parametrize("values", ["flat", "gaussian", "binary"])
@pytest.mark.parametrize("coefficients", ["gaussian", "signs"])
def test_planted(mask: str, values: str, coefficients: str) -> None:
    settings = replace(SMALL, mask=mask, values=values, coefficients=coefficients, noise=0.1)
    matrix, code, h = pt.planted(settings, 20, 3, 50, seed=4)
    clean = matrix.decode(code)
    torch.testing.assert_close(matrix.norms(), torch.ones(80))
    torch.testing.assert_close((h - clean).norm(dim=1), 0.1 * clean.norm(dim=1))
    assert all(len(set(row)) == 3 for row in code.indices.tolist())
    if coefficients == "signs":
        assert set(code.values.flatten().tolist()) == {-1.0, 1.0}
    if mask != "dense":
        entries = matrix.to_dense()[matrix.to_dense() != 0]
        assert len(entries) == 80 * 4
        sizes = entries.abs().sub(0.5).abs().max()
        assert (float(sizes) < 1e-6) == (values != "gaussian")
        assert bool((entries > 0).all()) == (values == "binary")


@given(successes=st.integers(0, 40), more=st.integers(0, 40))
def test_wilson_solves_its_equation(successes: int, more: int) -> None:
    trials = successes + more
    if not trials:
        return
    low, high = pt.wilson(successes, trials)
    rate = successes / trials
    assert 0 <= low <= rate + 1e-12
    assert rate - 1e-12 <= high <= 1
    for bound in (low, high):  # the score test just accepts its ends
        if 0 < bound < 1:
            assert abs(rate - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / trials), abs=1e-9)


@pytest.mark.parametrize(("b0", "b1"), [(6.0, 4.0), (12.0, 2.5), (40.0, 8.0)])
def test_the_fit_finds_the_curve_it_was_drawn_from(b0: float, b1: float) -> None:
    rhos = np.linspace(0.02, 0.6, 30)
    trials = 4000
    successes = np.random.default_rng(0).binomial(trials, expit(b0 * (1 - b1 * rhos)))
    fit = pt.fit_transition(rhos.tolist(), successes.tolist(), [trials] * 30)
    assert fit["b0"] == pytest.approx(b0, rel=0.05)
    assert fit["rho50"] == pytest.approx(1 / b1, rel=0.01)
    assert expit(fit["b0"] * (1 - fit["b1"] * fit["rho90"])) == pytest.approx(0.9)
    assert expit(fit["b0"] * (1 - fit["b1"] * fit["rho10"])) == pytest.approx(0.1)
    assert fit["rho90"] < fit["rho50"] < fit["rho10"]


def test_the_fit_at_the_edges() -> None:
    assert pt.fit_transition([0.1, 0.2], [8, 8], [8, 8])["beyond"] == "> 0.200"
    below = pt.fit_transition([0.1, 0.2], [0, 0], [8, 8])
    assert below["beyond"] == "< 0.100"
    assert below["rho50"] is None
    sharp = pt.fit_transition([0.1, 0.2, 0.3, 0.4], [8, 8, 0, 0], [8] * 4)
    assert 0.2 < sharp["rho50"] < 0.3
    assert all(math.isfinite(sharp[key]) for key in ("b0", "rho10", "rho90"))


def test_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pt.run_phase_transition(SMALL, tmp_path).rows
    assert [(row["delta"], row["m"]) for row in rows] == [(0.25, 20), (0.5, 40)]
    points = list(csv.DictReader((tmp_path / "map.csv").open()))
    assert [(int(p["m"]), int(p["k"])) for p in points] == [(20, k) for k in (4, 8, 12, 16)] + [
        (40, k) for k in (8, 16, 24, 32)
    ]
    assert [float(p["rate"]) for p in points] == [point["rate"] for row in rows for point in row["points"]]
    assert points[-1]["rate"] == "0.0"  # 32 of 40: hopeless
    for point in points:
        assert float(point["wilson_low"]) <= float(point["rate"]) <= float(point["wilson_high"])
        assert point["trials"] == "6"

    solved: list[tuple[int, int]] = []
    real = pt.recovery_errors
    monkeypatch.setattr(pt, "recovery_errors", lambda settings, m, k: solved.append((m, k)) or real(settings, m, k))
    assert pt.run_phase_transition(SMALL, tmp_path).rows == rows
    assert not solved
    lenient = pt.run_phase_transition(replace(SMALL, tolerance=100.0), tmp_path).rows  # other verdicts, same errors
    assert not solved
    assert {row["beyond"][0] for row in lenient} == {">"}
    finer = replace(SMALL, rhos=8)
    pt.run_phase_transition(finer, tmp_path)  # the same cells, and those between them
    assert solved == [(20, k) for k in (2, 6, 10, 14)] + [(40, k) for k in (4, 12, 20, 28)]
    with pytest.raises(ValueError, match="trials was 6 and is 7"):
        pt.run_phase_transition(replace(SMALL, trials=7), tmp_path)


def test_two_columns_of_eighty_are_found() -> None:
    assert all(error < 1e-3 for error in pt.recovery_errors(SMALL, 40, 2))


def test_the_picture() -> None:
    column = [{"rho": 0.2, "rate": 1.0}, {"rho": 0.6, "rate": 0.0}]
    rows: list[dict] = [
        {"delta": delta, "rho10": 0.4, "rho50": 0.3, "rho90": fit, "points": column}
        for delta, fit in ((0.5, 0.2), (0.25, 0.1))
    ]
    rows.append({"delta": 0.75, "rho10": None, "rho50": None, "rho90": None, "points": [{"rho": 0.3, "rate": 0.5}]})
    figure = plot_phase_transition(rows, "Title")
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("δ = m / n", "ρ = k / m", "Title")
    shown = points(axes)
    assert shown["50 % (logistic fit)"] == [[0.25, 0.3], [0.5, 0.3]]
    assert shown["90 %"] == [[0.25, 0.1], [0.5, 0.2]]
    columns = [collection.get_array().flatten().tolist() for collection in axes.collections]
    assert columns == [[1.0, 0.0], [1.0, 0.0], [0.5]]


def test_trials_are_dealt_over_the_draws_and_do_not_depend_on_the_grid() -> None:
    settings = replace(SMALL, trials=7, draws=3)
    errors = pt.recovery_errors(settings, 40, 8)
    assert len(errors) == 7
    assert errors == pt.recovery_errors(replace(settings, deltas=1, rhos=1), 40, 8)
    assert errors != pt.recovery_errors(replace(settings, seed=1), 40, 8)


def test_options_reach_the_solver_and_blocks_fit_small_codes() -> None:
    settings = replace(SMALL, options={"block": 4}, trials=30)
    assert len(pt.recovery_errors(settings, 40, 1)) == 30
    plain = pt.recovery_errors(replace(settings, options={}), 40, 12)
    assert sum(pt.recovery_errors(settings, 40, 12)) > sum(plain)  # blocks recover less


def test_noise_lowers_recovery_and_raises_the_tolerance() -> None:
    assert SMALL.success_below == 0.001
    noisy = replace(SMALL, noise=0.02)
    assert noisy.success_below == pytest.approx(0.1)
    assert replace(noisy, tolerance=0.05).success_below == 0.05
    assert min(pt.recovery_errors(noisy, 40, 2)) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "guess"}, "unknown solver 'guess'"),
        ({"options": {"blok": 2}}, "has no option 'blok'"),
        ({"mask": "random"}, "mask must be one of 'left-regular', .*'dense', got 'random'"),
        ({"max_delta": 0.0}, r"max_delta must lie in \(0, 1\]"),
        ({"max_rho": 1.5}, r"max_rho must lie in \(0, 1\]"),
        ({"rhos": 0}, "deltas and rhos must be at least 1, got 2 and 0"),
        ({"draws": 7}, "draws must be between 1 and trials = 6, got 7"),
        ({"noise": -1.0}, "noise must not be negative"),
        ({"max_delta": 0.05}, "the smallest m is 2, a column uses 4 rows"),
    ],
)
def test_mistakes(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.slow
def test_the_transitions_of_the_literature() -> None:
    """At m=512, n=4096, d=7, exact supports: the 50 % points of a small run of another program."""
    settings = pt.PhaseSettings(n=4096, trials=40)
    for values, coefficients, expected in (
        ("flat", "gaussian", 112),
        ("gaussian", "gaussian", 57),
        ("flat", "signs", 50),
    ):
        chosen = replace(settings, values=values, coefficients=coefficients)
        errors = {k: pt.recovery_errors(chosen, 512, k) for k in range(32, 161, 16)}
        successes = [sum(e <= 1e-4 for e in found) for found in errors.values()]
        fit = pt.fit_transition([k / 512 for k in errors], successes, [40] * len(errors))
        assert fit["rho50"] * 512 == pytest.approx(expected, rel=0.15)
