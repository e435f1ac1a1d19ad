"""``reproduce`` and ``demo`` on the command line: commands, help and mistakes come from the registry."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from expander_sae.cli import app
from expander_sae.experiments.registry import discover

NAMES = list(discover())


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.mark.parametrize("name", NAMES)
def test_each_explains_itself(name: str) -> None:
    shown = run("reproduce", name, "--help")
    assert shown.exit_code == 0, shown.output
    experiment = discover()[name]
    assert experiment.question in shown.output
    for option in ("--scale", "smoke|laptop|paper", "--out", "--set", f"expander-sae reproduce {name} --scale smoke"):
        assert option in shown.output
    assert ("--seeds" in shown.output) == experiment.has_seeds
    assert "--quick" not in shown.output


def test_the_list() -> None:
    shown = run("reproduce", "--list")
    assert shown.exit_code == 0
    for name, experiment in discover().items():
        assert name in shown.output
        assert experiment.question in shown.output
    assert all(name in run("reproduce", "--help").output for name in NAMES)


def test_settings_reach_the_experiment(tmp_path: Path) -> None:
    sets = ["n=80", "trials=4", "options.block=2", "options.disjoint=true"]
    arguments = [word for one in sets for word in ("--set", one)]
    shown = run("reproduce", "phase-transition", "--scale", "smoke", *arguments, "--out", str(tmp_path))
    assert shown.exit_code == 0, shown.output
    assert "ρ at 50 %" in shown.output
    size = json.loads((tmp_path / "results.json").read_text())["settings"]["size"]
    assert (size["n"], size["options"]) == (80, {"block": 2, "disjoint": True})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["phase-transition", "--set", "solver=guess"], 1, "guess"),
        (["phase-transition", "--set", "solvr=omp"], 1, "did you mean 'solver'"),
        (["phase-transition", "--set", "values=cauchy"], 1, "values must be one of 'flat', 'gaussian', 'binary'"),
        (["phase-transition", "--scale", "huge"], 2, "'smoke', 'laptop', 'paper'"),
        (["phase-transition", "--seeds", "3"], 2, "--seeds"),
        (["opm"], 2, "Did you mean 'omp'"),
    ],
)
def test_mistakes(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    shown = run("reproduce", *arguments, *(["--out", str(tmp_path)] if len(arguments) > 1 else []))
    assert shown.exit_code == code, shown.output
    assert message in " ".join(shown.output.split())
    assert "Traceback" not in shown.output


def test_demo_has_two_scales() -> None:
    assert "smoke|laptop" in run("demo", "--help").output
    assert run("demo", "--scale", "paper").exit_code == 2


def test_the_help_promises_commands_that_exist() -> None:
    words = " ".join(run("--help").output.split())
    assert "publish" not in words
    assert "reproduce" in words


def test_experiments_are_found_late_and_libraries_are_quiet() -> None:
    check = (
        "import os, sys; from typer.testing import CliRunner; from expander_sae.cli import app; "
        "shown = CliRunner().invoke(app, ['--help']); assert 'reproduce' in shown.output; "
        "assert not any(name.startswith('expander_sae.experiments') for name in sys.modules); "
        "CliRunner().invoke(app, ['info', 'nowhere']); assert os.environ['TQDM_DISABLE'] == '1'; "
        "from tqdm.auto import tqdm; list(tqdm(range(3)))"
    )
    ran = subprocess.run([sys.executable, "-c", check], check=True, timeout=120, capture_output=True, text=True)
    assert ran.stderr == ""
