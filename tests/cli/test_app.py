"""The commands on a small language model, end to end; a mistake is one message and exit code 1, never a traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from typer.testing import CliRunner, Result

import expander_sae
from expander_sae.cli import app
from expander_sae.data import ActivationStore, StoreMeta, StoreWriter
from expander_sae.mask import Mask
from expander_sae.sae import SAE
from expander_sae.training.recipe import read_config

WORDS, WIDTH, LAYERS, LAYER = 30, 32, 3, 1
SMALL = ["--d-sae", "24", "--degree", "4", "--k", "3", "--steps", "40", "--batch-size", "32"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` (a trained tiny Llama), ``text.jsonl`` and ``acts`` (harvested by the command)."""
    folder = tmp_path_factory.mktemp("place")
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    documents = [" ".join(f"w{(start + i) % WORDS}" for i in range(50)) for start in range(40)]
    tokens = torch.tensor([tokenizer(document)["input_ids"][:16] for document in documents])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    harvested = run("harvest", "--model", folder / "model", "--layer", LAYER, "--text", folder / "text.jsonl",
                    "--tokens", 1000, "--window", 16, "--out", folder / "acts", "--model-dtype", "float32")  # fmt: skip
    assert harvested.exit_code == 0, harvested.output
    assert "1,000 x 32, left out" in harvested.output
    return folder


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def trained(place: Path, out: Path, *more: Any) -> Result:
    result = run("train", "--store", place / "acts", "--out", out, *SMALL, *more)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def sae_folder(place: Path) -> Path:
    trained(place, place / "d4")
    return place / "d4"


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.count("Error: ") == 1
    assert "Traceback" not in result.output
    assert re.search(message, result.stderr), result.stderr


# The way it is meant to be used


def test_harvest_train_evaluate_info(place: Path, tmp_path: Path) -> None:
    shown = trained(place, tmp_path / "d4", "--set", "lr=5e-3", "--set", "log_every=10")
    assert re.search(r"d4: 96 values, 608 B, trained in \d+\.\d s", shown.output)
    sae = SAE.from_pretrained(tmp_path / "d4")
    assert (sae.d_in, sae.d_sae, sae.k) == (WIDTH, 24, 3)
    assert sae.metadata["training"]["config"]["lr"] == 5e-3
    origin = sae.metadata["trained_on"]
    assert (origin["model"], origin["layer"], origin["rows"]) == (str(place / "model"), LAYER, 1000)
    effective = yaml.safe_load((tmp_path / "d4" / "recipe.yaml").read_text())
    assert (effective["preset"], effective["lr"], effective["degree"]) == ("modern", 5e-3, 4)
    assert len((tmp_path / "d4" / "log.jsonl").read_text().splitlines()) == 4

    out = tmp_path / "rows.json"
    shown = run(
        "evaluate", tmp_path / "d4", "--text", place / "text.jsonl", "--window", 16, "--windows", 5, "--out", out
    )
    assert shown.exit_code == 0, shown.output
    assert "75 positions of 5 windows (heldout); replaced: all-but-first" in shown.output
    whole = json.loads(out.read_text())
    assert whole["settings"] == {
        "model": str(place / "model"),
        "revision": origin["revision"],
        "layer": LAYER,
        "text": str(place / "text.jsonl"),
        "split": "heldout",
        "window": 16,
        "windows": 5,
        "convention": "ours",
        "bos": False,
        "concatenate": True,
        "separator": "eos",
    }
    (row,) = whole["rows"]
    assert (row["num_values"], row["k"], row["l0"] <= 3) == (96, 3, True)
    assert row["ce_clean"] < row["ce_zero"]
    assert f"{row['fvu']:.3f}" in shown.output

    shown = run("info", tmp_path / "d4")
    assert shown.exit_code == 0, shown.output
    for fact in (
        "expander, tied encoder",
        "32 x 24",
        "learned values    96",
        "608 (608 B)",
        sae.dictionary.mask.sha256,
    ):  # type: ignore[union-attr]
        assert fact in shown.output
    assert "files and mask match their SHA-256" in shown.output


def test_info_of_a_store(place: Path) -> None:
    shown = run("info", place / "acts")
    assert shown.exit_code == 0, shown.output
    for fact in ("1,000 x 32", "in 1 shards", str(place / "model"), "all 1 shards match their SHA-256"):
        assert fact in shown.output
    assert "unfinished" not in shown.output


def test_info_of_an_unfinished_store(tmp_path: Path) -> None:
    meta = StoreMeta("toy", None, "toy", "residual", 1, 4, "float32", "prose", 8)
    writer = StoreWriter(tmp_path, meta, expected_rows=100)
    writer.append(torch.randn(5, 4), torch.arange(5), torch.arange(5), cursor=None)
    writer.commit()
    assert "5 x 4 (unfinished)" in run("info", tmp_path).output
    refused(run("train", "--store", tmp_path, "--out", tmp_path / "out"), "is unfinished: 5 rows so far")


@pytest.mark.parametrize(
    ("kind", "values"),
    [(["--dictionary", "dense"], 24 * 32), (["--encoder", "untied"], 2 * 96), (["--preset", "paper"], 96)],
)
def test_the_other_kinds(kind: list[str], values: int, place: Path, tmp_path: Path) -> None:
    trained(place, tmp_path, *kind)
    assert SAE.from_pretrained(tmp_path).num_values == values


def test_a_pursuit(place: Path, tmp_path: Path) -> None:
    trained(place, tmp_path, "--preset", "pursuit", "--encoder", "omp", "--set", "encoder_options={block: 2}")
    sae = SAE.from_pretrained(tmp_path)
    assert sae.config()["encoder"] == {"kind": "omp", "version": 1, "options": {"block": 2}}
    assert "expander, omp encoder" in run("info", tmp_path).output


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_flags_override_the_file_and_the_file_the_preset(suffix: str, place: Path, tmp_path: Path) -> None:
    path = tmp_path / f"mine{suffix}"
    path.write_text(json.dumps({"preset": "paper", "lr": 0.002, "degree": 6, "steps": 9, "seed": 4}))
    trained(place, tmp_path / "out", "--config", path, "--set", "clip_norm=2")
    found = read_config(tmp_path / "out" / "recipe.yaml")
    assert (found["preset"], found["lr"], found["degree"], found["steps"], found["seed"], found["clip_norm"]) == (
        "paper",
        0.002,
        4,
        40,
        4,
        2.0,
    )


def test_the_saved_recipe_trains_the_same_sae(place: Path, sae_folder: Path, tmp_path: Path) -> None:
    shown = run("train", "--store", place / "acts", "--config", sae_folder / "recipe.yaml", "--out", tmp_path)
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "sae.safetensors").read_bytes() == (sae_folder / "sae.safetensors").read_bytes()
    assert (tmp_path / "recipe.yaml").read_text() == (sae_folder / "recipe.yaml").read_text()


def test_training_again_changes_nothing(place: Path, tmp_path: Path) -> None:
    trained(place, tmp_path)
    before = (tmp_path / "sae.safetensors").read_bytes()
    trained(place, tmp_path)
    assert (tmp_path / "sae.safetensors").read_bytes() == before


def test_several_saes_at_once(place: Path, sae_folder: Path, tmp_path: Path) -> None:
    trained(place, tmp_path / "other", "--dictionary", "dense")
    out = tmp_path / "rows.json"
    arguments = (
        "--text",
        place / "text.jsonl",
        "--window",
        16,
        "--windows",
        3,
        "--out",
        out,
        "--replaced",
        "all",
        "--split",
        "train",
    )
    shown = run("evaluate", sae_folder, f"{tmp_path / 'other'}/", *arguments)
    assert shown.exit_code == 0, shown.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == [str(sae_folder), str(tmp_path / "other")]
    assert {row["tokens"] for row in rows} == {48}


def test_version_and_help() -> None:
    assert run("--version").output.strip() == expander_sae.__version__
    assert "harvest" in run().output
    for command in ("demo", "harvest", "train", "evaluate", "info"):
        shown = run(command, "--help")
        assert shown.exit_code == 0
        assert "Example" in shown.output
        assert f"expander-sae {command}" in shown.output


# Mistakes


def test_an_unknown_option_is_a_usage_error() -> None:
    shown = run("train", "--colour", "red")
    assert shown.exit_code == 2
    assert "Traceback" not in shown.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "25"], "k must be between 1 and d_sae = 24, got 25"),
        (["--degree", "33"], "degree 33 exceeds d_in 32"),
        (["--degree", "0"], "degree must be at least 1, got 0"),
        (["--preset", "best"], "unknown preset 'best'; choose one of 'paper', 'modern'"),
        (["--dictionary", "sparse"], "dictionary must be one of 'expander', 'dense'"),
        (["--encoder", "gated"], "unknown encoder 'gated'; did you mean 'tied'"),
        (["--encoder", "omp", "--set", "aux_k=5"], "set aux_k=0"),
        (["--set", "colour=red"], "unknown setting 'colour'; the settings are"),
        (["--set", "lr"], "expected name=value, got 'lr'"),
        (["--set", "lr=[1"], "cannot be read as YAML"),
        (["--set", "lr=fast"], "lr must be of type float, got 'fast'"),
        (["--set", "lr=nan"], "lr"),
        (["--batch-size", "2000"], "batch_size must be from 1 to the number of rows, 1000, not 2000"),
        (["--config", "none.yaml"], "the config file none.yaml cannot be read"),
        (["--store", "nowhere"], "nowhere is not an activation store"),
        (["--track", "mlflow"], "unknown tracker 'mlflow'"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_train_refuses(flags: list[str], message: str, place: Path, tmp_path: Path) -> None:
    arguments = ["train", "--store", place / "acts", "--out", tmp_path / "out", *SMALL, *flags]
    refused(run(*arguments), message)
    assert not (tmp_path / "out" / "sae.safetensors").exists()
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_square_brackets_in_a_message_are_shown(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    shown = run("train", "--store", place / "acts", "--out", tmp_path, *SMALL, "--track", "wandb")
    refused(shown, r"pip install 'expander-sae\[track\]'")
    refused(run("info", "[/nowhere] [bold]x"), r"\[/nowhere\] \[bold\]x")


def test_another_configuration_in_the_folder_is_refused_and_harmless(place: Path, tmp_path: Path) -> None:
    trained(place, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    refused(
        run("train", "--store", place / "acts", "--out", tmp_path, *SMALL, "--degree", 5),
        r"sae\.dictionary\.mask\.degree was 4 and is 5",
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    trained(place, tmp_path, "--degree", 5, "--restart")
    assert SAE.from_pretrained(tmp_path).num_values == 24 * 5


def test_divergence_keeps_the_recipe(place: Path, tmp_path: Path) -> None:
    flags = ("--set", "lr=1e18", "--set", "clip_norm=1e30", "--set", "aux_k=0", "--set", "warmup_steps=0")
    refused(run("train", "--store", place / "acts", "--out", tmp_path, *SMALL, *flags), "training diverged")
    assert read_config(tmp_path / "recipe.yaml")["lr"] == 1e18


def damage(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sae.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "sae.safetensors was altered"),
        ("sae.safetensors", lambda data: data[:-1], "truncated or altered"),
        (
            "config.json",
            lambda data: data.replace(b'"version": 2', b'"version": 1', 1),
            "format version 1, this program reads version 2",
        ),
        ("config.json", lambda data: data.replace(b'"k": 3', b'"k": 4'), "config.json was altered"),
        ("config.json", lambda data: b"", "not readable JSON"),
    ],
)
def test_a_damaged_sae(
    name: str, change: Callable[[bytes], bytes], message: str, sae_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(sae_folder, tmp_path / "sae")
    damage(tmp_path / "sae", name, change)
    refused(run("info", tmp_path / "sae"), message)
    refused(run("evaluate", tmp_path / "sae"), message)


def test_a_damaged_store(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "acts", tmp_path / "acts")
    shard = next((tmp_path / "acts").glob("shard-*")).name
    damage(tmp_path / "acts", shard, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    refused(run("info", tmp_path / "acts"), f"{shard} was altered")
    damage(tmp_path / "acts", shard, lambda data: data[:-4])
    for command in (["info", tmp_path / "acts"], ["train", "--store", tmp_path / "acts", "--out", tmp_path / "out"]):
        refused(run(*command), f"{shard} has .* bytes, the manifest says")


def test_neither_an_sae_nor_a_store(tmp_path: Path) -> None:
    refused(run("info", tmp_path), r"holds no config\.json: not an SAE folder")
    refused(
        run("info", "runs/nothing"), "there is no folder runs/nothing, and the Hugging Face Hub could not be reached"
    )


def test_evaluate_refuses(place: Path, sae_folder: Path, tmp_path: Path) -> None:
    text = ("--text", place / "text.jsonl", "--window", 16)
    refused(run("evaluate", sae_folder, "--layer", 7, *text), f"has no layer 7: it has {LAYERS} blocks")
    refused(run("evaluate", sae_folder, "--replaced", "some", *text), "replaced must be 'all-but-first' or 'all'")
    refused(
        run("evaluate", sae_folder, "--text", place / "text.jsonl", "--window", 2000), "shorter than one window of 2000"
    )
    refused(run("evaluate", sae_folder, "--text", "none.txt"), r"no text file or folder none\.txt")
    SAE.expander(Mask.build("balanced", d_in=8, d_sae=9, degree=2), 2).save_pretrained(tmp_path)
    refused(run("evaluate", tmp_path, "--model", place / "model", *text), "do not name one layer .* give --layer")
    refused(
        run("evaluate", tmp_path, "--model", place / "model", "--layer", 0, *text),
        "reads d_in = 8, the model's residual stream has width 32",
    )
    refused(run("evaluate", sae_folder, tmp_path, *text), "give --model")


def test_harvest_refuses(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = [
        "harvest",
        "--model",
        place / "model",
        "--text",
        place / "text.jsonl",
        "--tokens",
        100,
        "--window",
        16,
        "--out",
        tmp_path / "new",
    ]
    refused(run(*base), "say which with --layer")
    refused(run(*base, "--layer", LAYERS), f"has no layer {LAYERS}")
    refused(run(*base, "--layer", 0, "--window", 2000, "--split", "heldout"), "shorter than one window of 2000")
    refused(run(*base, "--layer", 0, "--window", 5000), "from 2 to the model's context of 2048 tokens, not 5000")
    refused(run(*base, "--layer", 0, "--dtype", "int8"), "int8")
    refused(
        run(*base, "--layer", 0, "--model-dtype", "int8"), "dtype must be auto, float32, bfloat16, float16, not 'int8'"
    )
    refused(run(*base, "--layer", 0, "--text", tmp_path / "none.txt"), "no text file or folder")
    refused(
        run("harvest", "--model", "nobody/nothing", "--layer", 0, "--out", tmp_path / "new"),
        "Without a hub, use the model 'embedded'",
    )
    refused(run(*base[:-1], place / "acts", "--layer", 0), "layer: 1, not 0")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage)
    refused(run(*base, "--layer", 0), r"has 10 B free\. Free some room")
    assert not list((tmp_path / "new").glob("shard-*"))


def test_a_fault_of_ours_still_shows(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    def fault(*_arguments: Any, **_options: Any) -> None:
        raise KeyError("not the user's")

    monkeypatch.setattr(ActivationStore, "open", fault)
    assert isinstance(run("info", place / "acts").exception, KeyError)


# Ctrl-C


def test_ctrl_c_while_training_then_the_same_command(place: Path, tmp_path: Path) -> None:
    settings = ["--store", place / "acts", *SMALL, "--steps", 500, "--set", "log_every=1"]
    command = [sys.executable, "-m", "expander_sae", "train", "--out", tmp_path / "cut", *settings]
    process = subprocess.Popen(
        [str(word) for word in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    log = tmp_path / "cut" / "log.jsonl"
    for _ in range(6000):
        if log.exists() and log.stat().st_size > 500:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted; the same command continues where it stopped." in errors
    assert "Traceback" not in errors
    names = {path.name for path in (tmp_path / "cut").iterdir()}
    assert names == {"checkpoint.safetensors", "log.jsonl", "recipe.yaml"}
    reached = len(log.read_text().splitlines())
    assert 0 < reached < 500

    assert run("train", "--out", tmp_path / "cut", *settings).exit_code == 0
    assert run("train", "--out", tmp_path / "whole", *settings).exit_code == 0
    assert (tmp_path / "cut" / "sae.safetensors").read_bytes() == (tmp_path / "whole" / "sae.safetensors").read_bytes()
    assert len(log.read_text().splitlines()) == 500


def test_ctrl_c_anywhere_else(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    def interrupt(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ActivationStore, "open", interrupt)
    shown = run("info", place / "acts")
    assert shown.exit_code == 130
    assert "Interrupted" in shown.stderr
    assert isinstance(shown.exception, SystemExit | click.exceptions.Exit)
