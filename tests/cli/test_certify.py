"""``expander-sae certify``: a mask, an SAE, its codes; kept, shown, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from support.training import activations, expander
from typer.testing import CliRunner

from expander_sae.cli import app
from expander_sae.data import StoreMeta, StoreWriter
from expander_sae.theory import Certificate

MASK = ("--mask", "left-regular", "--d-in", "64", "--d-sae", "128", "--degree", "5", "--k", "8")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    h = activations()
    meta = StoreMeta("toy", None, "toy", "residual", 0, h.shape[1], "float32", "held-out prose", 8)
    with StoreWriter(tmp_path / "store", meta, expected_rows=len(h)) as writer:
        writer.append(h, torch.arange(len(h)), torch.arange(len(h)), cursor=None)
    return tmp_path / "store"


def test_a_mask(tmp_path: Path) -> None:
    shown = run("certify", *MASK, "--json", tmp_path / "mask.json")
    assert shown.exit_code == 0, shown.output
    assert "64 x 128, d=5; coherence μ = " in shown.output
    assert "R_OMP" in shown.output
    assert "used at k = 8" in shown.output
    known = Certificate.from_dict(json.loads((tmp_path / "mask.json").read_text()))
    assert (known.d_in, known.d_sae, known.degree, known.k) == (64, 128, 5, 8)


def test_an_sae_with_its_codes(tmp_path: Path, store: Path) -> None:
    expander().save_pretrained(tmp_path / "sae")
    shown = run("certify", tmp_path / "sae", "--store", store, "--rows", 60, "--save")
    assert shown.exit_code == 0, shown.output
    for part in ("60 codes of held-out prose", "σ_min", "found whole", "Saved in", "On 60 codes"):
        assert part in shown.output
    assert "every code recovered up to k = " in run("info", tmp_path / "sae").output
    config = json.loads((tmp_path / "sae" / "config.json").read_text())
    assert Certificate.from_dict(config["certificate"]).codes is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one of the two"),
        (("somewhere", *MASK), "one of the two"),
        (MASK[:6], "a mask needs --degree"),
        ((*MASK, "--save"), "a mask alone"),
        (("somewhere", "--degree", 7), "an SAE has its own"),
        (("nowhere/at-all", "--save"), "is none"),
        ((*MASK[:-1], 200), "k must be in"),
    ],
)
def test_what_is_refused(arguments: tuple[object, ...], message: str) -> None:
    shown = run("certify", *arguments)
    assert shown.exit_code == 1
    assert message in shown.stderr
