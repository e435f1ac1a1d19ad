"""``expander-sae train``: from elsewhere, longer, other signals, its settings and its help."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from support.stores import META
from typer.testing import CliRunner

from expander_sae.cli import app
from expander_sae.cli import train as command
from expander_sae.data import ActivationStore, StoreMeta, StoreWriter
from expander_sae.sae import ENCODERS, SAE
from expander_sae.training import load_sae
from expander_sae.training.recipe import FIELDS, PRESETS, read_config

SMALL = ["--d-sae", "24", "--degree", "4", "--k", "3", "--steps", "40", "--batch-size", "32"]
WIDTH = 16


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of sparse combinations of hidden features on a mean."""
    folder = tmp_path_factory.mktemp("place") / "acts"
    generator = torch.Generator().manual_seed(0)
    code = torch.rand(800, 24, generator=generator)
    rows = 5 * (code * (code > 0.9)) @ torch.randn(24, WIDTH, generator=generator)
    rows += 3 * torch.randn(WIDTH, generator=generator)
    meta = StoreMeta(**(vars(META) | {"d_in": WIDTH, "dtype": "float32"}))
    with StoreWriter(folder, meta, expected_rows=len(rows)) as writer:
        writer.append(rows, torch.arange(len(rows)), torch.arange(len(rows)), cursor=1)
    return folder


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def trained(acts: Path, out: Path, *more: Any) -> Result:
    result = run("train", "--store", acts, "--out", out, *more)
    assert result.exit_code == 0, result.output
    return result


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert re.search(message, result.stderr), result.stderr


def fvu(sae: SAE, acts: Path) -> float:
    h = ActivationStore.open(acts).rows(slice(None))
    return float((h - sae(h)).detach().square().sum() / (h - h.mean(dim=0)).square().sum())


def test_an_sae_is_trained_further(acts: Path, tmp_path: Path) -> None:
    first, further = tmp_path / "first", tmp_path / "further"
    trained(acts, first, *SMALL, "--degree", 5)
    trained(acts, further, "--from", first, "--steps", 60, "--batch-size", 32)
    before, after = load_sae(first), load_sae(further)
    assert (after.num_values, after.k) == (before.num_values, before.k) == (24 * 5, 3)
    assert fvu(after, acts) < fvu(before, acts)
    assert after.metadata["training"]["continues"] == before.metadata["training"]
    recipe = read_config(further / "recipe.yaml")
    assert (recipe["from"], recipe["steps"]) == (str(first), 60)
    assert "d_sae" not in recipe
    # Its recipe does the same again; that of the first SAE has settings of the SAE, which stand already.
    trained(acts, tmp_path / "again", "--config", further / "recipe.yaml")
    assert (tmp_path / "again" / "sae.safetensors").read_bytes() == (further / "sae.safetensors").read_bytes()
    trained(acts, tmp_path / "third", "--config", first / "recipe.yaml", "--from", first, "--set", "lr=1e-3")
    assert read_config(tmp_path / "third" / "recipe.yaml")["lr"] == 1e-3


def test_an_sae_is_trained_further_where_it_is(acts: Path, tmp_path: Path) -> None:
    trained(acts, tmp_path, *SMALL)
    (tmp_path / "checkpoint.safetensors").unlink()
    refused(run("train", "--store", acts, "--out", tmp_path, *SMALL), "holds an SAE and no checkpoint")
    before = load_sae(tmp_path)
    trained(acts, tmp_path, "--from", tmp_path, "--steps", 60, "--batch-size", 32)
    assert fvu(load_sae(tmp_path), acts) < fvu(before, acts)


@pytest.mark.parametrize("flags", [["--k", "4"], ["--set", "d_sae=30"], ["--encoder", "omp"], ["--degree", "4"]])
def test_what_is_decided_cannot_be_set(flags: list[str], acts: Path, tmp_path: Path) -> None:
    trained(acts, tmp_path / "first", *SMALL)
    refused(
        run("train", "--store", acts, "--out", tmp_path / "out", "--from", tmp_path / "first", *flags),
        r"(k|d_sae|encoder|degree) cannot be set together with --from",
    )


def test_from_nothing(acts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(run("train", "--store", acts, "--out", tmp_path / "out", "--from", "runs/nothing"), "there is no folder")


def test_a_pursuit_goes_on_with_the_default_preset(acts: Path, tmp_path: Path) -> None:
    trained(acts, tmp_path / "first", *SMALL, "--encoder", "omp")  # the preset's AuxK yields
    trained(acts, tmp_path / "further", "--from", tmp_path / "first", "--steps", 20, "--batch-size", 32)
    assert load_sae(tmp_path / "further").encoder.kind == "omp"
    assert read_config(tmp_path / "first" / "recipe.yaml")["resample_every"] > 0


def test_after_divergence(acts: Path, tmp_path: Path) -> None:
    """From the last good checkpoint with a lower rate, as the message says."""
    settings = ["lr=10000", "warmup_steps=2000", "aux_k=0", "checkpoint_every=1", "log_every=40"]
    rough = [word for setting in settings for word in ("--set", setting)]
    diverged = run("train", "--store", acts, "--out", tmp_path / "rough", *SMALL, *rough)
    refused(diverged, "training diverged")
    assert (tmp_path / "rough" / "recipe.yaml").exists()
    assert not (tmp_path / "rough" / "config.json").exists()
    shown = run("info", tmp_path / "rough")
    assert re.search(r"checkpoint\.safetensors, \d+ of 40 steps done", shown.output)
    further = ("--from", tmp_path / "rough" / "checkpoint.safetensors", "--steps", 60, "--batch-size", 32)
    trained(acts, tmp_path / "further", *further, "--set", "lr=0.5")
    assert fvu(load_sae(tmp_path / "further"), acts) < min(1, fvu(load_sae(tmp_path / "rough"), acts))


def test_more_steps(acts: Path, tmp_path: Path) -> None:
    trained(acts, tmp_path, *SMALL)
    shown = trained(acts, tmp_path, *SMALL, "--steps", 60)
    assert "a finished run of 40 steps goes on to 60" in shown.stderr
    assert read_config(tmp_path / "recipe.yaml")["steps"] == 60
    assert load_sae(tmp_path).metadata["training"]["longer_than_planned"] == [40]


def test_refused_settings_do_not_replace_those_of_the_checkpoint(acts: Path, tmp_path: Path) -> None:
    trained(acts, tmp_path, *SMALL)
    before = (tmp_path / "recipe.yaml").read_bytes()
    refused(run("train", "--store", acts, "--out", tmp_path, *SMALL, "--set", "lr=1"), r"train\.lr was 0\.01 and is 1")
    assert (tmp_path / "recipe.yaml").read_bytes() == before


def test_home(acts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "acts").symlink_to(acts)
    (tmp_path / "c.yaml").write_text("lr: 0.003\n")
    trained(Path("~/acts"), Path("~/out"), *SMALL, "--config", "~/c.yaml")
    assert read_config(tmp_path / "out" / "recipe.yaml")["lr"] == 0.003
    trained(Path("~/acts"), Path("~/out2"), "--from", "~/out", "--steps", 20, "--batch-size", 32)
    assert run("info", "~/out2").exit_code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_cuda(acts: Path, tmp_path: Path) -> None:
    shown = run("train", "--store", acts, "--out", tmp_path, *SMALL, "--device", "cuda")
    refused(shown, "sees no CUDA device here")


def test_a_setting_misspelt(acts: Path, tmp_path: Path) -> None:
    shown = run("train", "--store", acts, "--out", tmp_path, *SMALL, "--set", "steeps=3", "--set", "warmup=1")
    refused(shown, r"unknown setting 'steeps' \(did you mean 'steps'\?\), 'warmup' \(did you mean 'warmup_steps'\?\)")
    refused(run("train", "--store", acts, "--out", tmp_path, "--preset", "modrn"), "did you mean 'modern'")


def test_the_help_names_the_choices_there_are() -> None:
    for text, names in ((command.PRESET_CHOICES, PRESETS), (command.ENCODERS, ENCODERS)):
        assert set(re.findall(r"`([\w-]+)`", text)) == set(names)
    shown = " ".join(run("train", "--help").output.replace("│", " ").split())
    for name in (*PRESETS, "tied", "omp", "cosamp", "expander", "dense", "tensorboard", "wandb"):
        assert name in shown


def test_all_settings_are_listed() -> None:
    shown = run("train", "--settings")
    assert shown.exit_code == 0
    for name in (*FIELDS, *PRESETS):
        assert re.search(rf"^  {name}\b", shown.output, re.MULTILINE), name
    assert "one of tied, untied" in shown.output


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_scheduler_ends_it(name: str, code: int, acts: Path, tmp_path: Path) -> None:
    settings = ["--store", acts, *SMALL, "--steps", 3000, "--set", "log_every=1"]
    words = [sys.executable, "-m", "expander_sae", "train", "--out", tmp_path, *settings]
    process = subprocess.Popen(
        [str(word) for word in words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    log = tmp_path / "log.jsonl"
    for _ in range(6000):
        if log.exists() and log.stat().st_size > 500:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"Stopped by {name}; the same command continues where it stopped." in errors
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.safetensors", "log.jsonl", "recipe.yaml"}
    steps = load_sae(tmp_path).metadata["training"]["steps"]
    assert 0 < steps == json.loads(log.read_text().splitlines()[-1])["step"] < 3000
