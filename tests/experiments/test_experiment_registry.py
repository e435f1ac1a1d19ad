"""Every experiment of the registry runs at its smoke scale; its record is whole; the page about them is up to date."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from expander_sae.experiments import registry
from expander_sae.experiments.common.results import Finding
from expander_sae.experiments.common.resume import Cells
from expander_sae.experiments.common.settings import described, revised
from expander_sae.experiments.demo import DEMO
from expander_sae.experiments.registry import Experiment, discover, perform
from expander_sae.report.table import Column, text

EXPERIMENTS = [*discover().values(), DEMO]
PAGE = Path(__file__).parents[2] / "docs" / "experiments.md"


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_smoke(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The demo is smoke-tested on the embedded model, too: its smallest size is still of that width.
    smaller = {"batch_size": 64, "d_sae": 64, "k": 4, "degrees": [3], "steps": 8}
    settings = experiment.settings("smoke", changes=smaller if experiment is DEMO else {})
    rows = perform(experiment, settings, tmp_path, scale="smoke")
    assert rows
    for name in ("results.json", "results.md", "cells.json", f"{experiment.name}.png"):
        assert (tmp_path / name).stat().st_size > 0
    whole = json.loads((tmp_path / "results.json").read_text())
    assert whole["rows"] == json.loads(json.dumps(rows))
    assert (whole["settings"]["experiment"], whole["settings"]["scale"]) == (experiment.name, "smoke")
    shown = capsys.readouterr().out
    assert "(smoke)" in shown
    assert "signed" in shown, "every table says whether codes may be negative"
    for column in experiment.columns:
        assert column.heading in shown
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}) <= 2  # two tables

    monkeypatch.setattr(Cells, "save", lambda self: pytest.fail("something was computed again"))
    assert perform(experiment, settings, tmp_path, scale="smoke") == rows, "a finished run is not computed again"


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_the_record(experiment: Experiment) -> None:
    kinds = {type(settings) for settings in experiment.sizes.values()}
    assert len(kinds) == 1
    assert all(described(kinds.pop()).values())
    assert set(experiment.sizes) == set(registry.SCALES) or experiment is DEMO


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == registry.markdown(), (
        "run python -m expander_sae.experiments > docs/experiments.md"
    )


@dataclass(frozen=True)
class Toy:
    """Settings of no experiment."""

    count: int = 1
    """How many."""
    rate: float = 0.5
    """How fast."""
    limit: float | None = None
    """How far."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    sizes: tuple[int, ...] = (1,)
    """How large."""
    options: dict[str, Any] = None  # type: ignore[assignment]
    """More
    of it."""
    loud: bool = False
    """Whether."""
    seeds: tuple[int, ...] = (0,)
    """Runs."""


TOY = Experiment(
    name="toy",
    question="Does it?",
    sizes=dict.fromkeys(registry.SCALES, Toy(options={})),
    run=lambda settings, out: Finding([{"a": 1}], "Toy", []),
    columns=(Column("a", text("a")),),
    picture=lambda rows, title: pytest.fail("not drawn"),
)


def test_settings_are_changed_by_name_and_type() -> None:
    changes = {"count": 3, "rate": "1e-3", "limit": 2, "kind": "b", "sizes": 4, "options.block": 4, "loud": True}
    found = TOY.settings("smoke", 2, changes)
    assert found == Toy(3, 0.001, 2.0, "b", (4,), {"block": 4}, True, (0, 1))
    assert isinstance(found.limit, float)
    assert TOY.settings(changes={"sizes": "16, 32"}).sizes == (16, 32), "as the help shows it"
    both = revised(Toy(options={"a": 1}), {"options.b": 2, "options.c": 3})
    assert both.options == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuont": 1}, "unknown setting 'cuont'; did you mean 'count'"),
        ({"count": 1.5}, "count must be of type int, got 1.5"),
        ({"count": True}, "count must be of type int"),
        ({"rate": "fast"}, "rate must be of type float, got 'fast'"),
        ({"kind": "c"}, "kind must be one of 'a', 'b', got 'c'"),
        ({"sizes": [1, "x"]}, "sizes must be of type int, got 'x'"),
        ({"options": 3}, "options must be of type dict"),
        ({"loud": 1}, "loud must be of type bool"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TOY.settings("smoke", changes=changes)


def test_scales_and_seeds() -> None:
    with pytest.raises(ValueError, match="unknown scale of toy 'huge'; choose one of 'smoke', 'laptop', 'paper'"):
        TOY.settings("huge")
    with pytest.raises(ValueError, match="unknown scale of demo 'paper'"):
        DEMO.settings("paper")
    with pytest.raises(ValueError, match="block-size cannot be run over 3 seeds"):
        discover()["block-size"].settings("smoke", 3)


def test_what_a_record_must_have() -> None:
    with pytest.raises(ValueError, match="lower-case name and a question"):
        replace(TOY, question="Yes.")
    with pytest.raises(ValueError, match="at most 7 columns, got 8"):
        replace(TOY, columns=TOY.columns * 8)
    with pytest.raises(ValueError, match="lacks the scale paper"):
        registry.register(replace(TOY, sizes={"smoke": Toy(), "laptop": Toy()}))
    with pytest.raises(ValueError, match="'omp' already"):
        registry.register(replace(TOY, name="omp"))
    with pytest.raises(ValueError, match="unknown experiment 'opm'; did you mean 'omp'"):
        registry.REGISTRY["opm"]


def test_choices_are_part_of_the_meaning() -> None:
    assert described(Toy)["kind"] == "Which. One of: a, b."
    assert described(Toy)["options"] == "More of it."

    @dataclass
    class Silent:
        name: str = ""

    with pytest.raises(ValueError, match="Silent: no docstring under name"):
        described(Silent)
