"""``harvest`` and ``evaluate`` on small language models: which model, place, text and convention."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lm import BOS, WORDS, HubCache, tiny_lm, tiny_tokenizer
from typer.testing import CliRunner, Result

from expander_sae.cli import app
from expander_sae.data import ActivationStore
from expander_sae.lm import ModelError, Site, harvest_many, load_model
from expander_sae.mask import Mask
from expander_sae.sae import SAE

WINDOW = 16


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = random.Random(0)
    path = tmp_path / "text.jsonl"
    lines = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(5, 60)))} for _ in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def done(*arguments: Any) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert re.search(message, result.stderr), result.stderr


def harvested(model: Any, text: Path, out: Path, *more: Any) -> ActivationStore:
    common = ("--text", text, "--tokens", 300, "--window", WINDOW, "--model-dtype", "float32", "--device", "cpu")
    done("harvest", "--model", model, "--out", out, *common, *more)
    return ActivationStore.open(out)


def an_sae(store: ActivationStore, out: Path) -> Path:
    sae = SAE.expander(Mask.build("balanced", d_in=32, d_sae=64, degree=5), 8)
    sae.metadata["trained_on"] = store.origin()
    sae.save_pretrained(out)
    return out


def evaluated(sae: Path, text: Path, *more: Any) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The row, the settings and what was printed."""
    out = sae.parent / "rows.json"
    shown = done(*evaluate(sae, text), "--out", out, *more)
    whole = json.loads(out.read_text())
    return whole["rows"][0], whole["settings"], shown.output


def evaluate(sae: Path, text: Path) -> tuple[Any, ...]:
    sizes = ("--window", WINDOW, "--windows", 4)
    return ("evaluate", sae, "--text", text, *sizes, "--model-dtype", "float32", "--device", "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lm = tiny_lm()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Which model


def test_the_recorded_revision_is_evaluated(hub: HubCache, text: Path, tmp_path: Path) -> None:
    old = hub.commit(tiny_lm(seed=1), "step1")
    new = hub.commit(tiny_lm(seed=2), "main")
    store = harvested("owner/model", text, tmp_path / "acts", "--layer", 1, "--revision", "step1")
    assert store.origin()["revision"] == old
    sae = an_sae(store, tmp_path / "sae")
    row, settings, _ = evaluated(sae, text)
    assert settings["revision"] == old
    other, settings, _ = evaluated(sae, text, "--revision", "main", "--allow-mismatch")
    assert settings["revision"] == new
    assert other["ce_clean"] != pytest.approx(row["ce_clean"], rel=1e-6)
    refused(run(*evaluate(sae, text), "--revision", "main"), f"weights: trained on {old} .* this is {new}")


def test_other_weights_in_the_same_folder_are_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    sae = an_sae(harvested(folder, text, tmp_path / "acts", "--layer", 1), tmp_path / "sae")
    evaluated(sae, text)
    tiny_lm(seed=3).model.save_pretrained(folder)
    refused(run(*evaluate(sae, text)), r"weights: trained on weights-\w+ of .*, this is weights-")
    _, _, output = evaluated(sae, text, "--allow-mismatch")
    assert "Not as trained: weights: trained on weights-" in output


def test_a_relative_folder_is_found_from_elsewhere(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = harvested("model", text, tmp_path / "acts", "--layer", 1)
    assert store.origin()["model"] == str(folder)
    sae = an_sae(store, tmp_path / "sae")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluated(sae, text)
    monkeypatch.setenv("HOME", str(tmp_path))
    done("evaluate", "~/sae", "--text", "~/text.jsonl", "--window", WINDOW, "--windows", 2, "--out", "~/out.json")
    assert (tmp_path / "out.json").exists()


def test_another_tokenizer_is_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    sae = an_sae(harvested(folder, text, tmp_path / "acts", "--layer", 1), tmp_path / "sae")
    tiny_tokenizer(bos=True).save_pretrained(folder)
    refused(run(*evaluate(sae, text)), "tokenizer: trained with tokenizer-")


def test_a_device_that_is_not_there(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(run("harvest", "--model", folder, "--layer", 0, "--device", "cuda", "--out", tmp_path / "acts"),
            "sees no CUDA device")  # fmt: skip


def test_how_a_model_is_loaded_is_the_users_choice(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = an_sae(harvested(folder, text, tmp_path / "acts", "--layer", 1), tmp_path / "sae")
    asked: list[dict[str, Any]] = []

    def load(name: str, **how: Any) -> None:
        asked.append(how)
        raise ModelError("no further")

    monkeypatch.setattr("expander_sae.lm.load_model", load)
    options = ("--device-map", "auto", "--quantize", "4bit", "--trust-remote-code", "--tokenizer", "other/one")
    for command in (("harvest", "--model", folder, "--layer", 1, "--out", tmp_path / "new"), ("evaluate", sae)):
        refused(run(*command, *options, "--model-dtype", "bfloat16"), "no further")
        found = {key: asked[-1][key] for key in ("device_map", "quantize", "trust_remote_code", "tokenizer", "dtype")}
        assert list(found.values()) == ["auto", "4bit", True, "other/one", "bfloat16"]
        refused(run(*command), "no further")
        assert (asked[-1]["device_map"], asked[-1]["quantize"], asked[-1]["trust_remote_code"]) == (None, None, False)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    command = ("harvest", "--model", tmp_path, "--layer", 1, "--out", tmp_path / "acts")
    refused(run(*command), r"(?s)is an adapter \(LoRA, PEFT\) for owner/base.*merge_and_unload")


# Which place


def test_an_sae_of_mlp_outputs_is_evaluated_there(folder: Path, text: Path, tmp_path: Path) -> None:
    sae = an_sae(harvested(folder, text, tmp_path / "acts", "--layer", 2, "--hook", "mlp"), tmp_path / "sae")
    row, _, _ = evaluated(sae, text)
    refused(run(*evaluate(sae, text), "--hook", "residual"), "hook: trained on 'mlp', this is 'residual'")
    refused(run(*evaluate(sae, text), "--layer", 1), "layer: trained on 2, this is 1")
    other, _, _ = evaluated(sae, text, "--hook", "residual", "--allow-mismatch")
    assert other["fvu"] != pytest.approx(row["fvu"], rel=1e-3)


def test_several_places_in_one_pass(folder: Path, text: Path, tmp_path: Path) -> None:
    shown = done(
        "harvest", "--model", folder, "--out", tmp_path / "acts", "--text", text, "--tokens", 200, "--window", WINDOW,
        "--model-dtype", "float32", "--layer", 0, "--layer", 2, "--hook", "residual", "--hook", "attention",
    )  # fmt: skip
    names = {"residual-0", "attention-0", "residual-2", "attention-2"}
    assert {path.name for path in (tmp_path / "acts").iterdir()} == names
    assert all(f"{name}: 200 x 32" in shown.output for name in names)
    lm = load_model(folder, dtype="float32")
    again = harvest_many(lm, text, [2], 200, tmp_path / "python", window=WINDOW)
    assert torch.equal(
        again[Site(2)].rows(slice(None)), ActivationStore.open(tmp_path / "acts/residual-2").rows(slice(None))
    )


# Which convention


def test_the_convention_is_printed_and_stored(folder: Path, text: Path, tmp_path: Path) -> None:
    sae = an_sae(harvested(folder, text, tmp_path / "acts", "--layer", 1), tmp_path / "sae")
    ours, settings, output = evaluated(sae, text)
    assert settings["convention"] == ours["convention"] == "ours"
    assert "Convention ours: all positions but the first" in output
    assert re.search(r"left alone: 0 \(limit [\d.e+]+, recorded\)", output)
    assert ours["norm_limit"] == ActivationStore.open(tmp_path / "acts").origin()["norm_limit"]
    assert f"Codes may be negative (signed): {sae}; those of OMP always." in output
    paper, settings, output = evaluated(sae, text, "--convention", "paper")
    assert (settings["convention"], settings["concatenate"], paper["replaced"]) == ("paper", False, "all")
    assert "one document each" in output
    assert paper["tokens"] == ours["tokens"] // (WINDOW - 1) * WINDOW
    _, settings, output = evaluated(sae, text, "--replaced", "all", "--max-norm-multiple", "inf")
    assert settings["convention"] == "ours, replaced all"
    assert "(no limit, no limit)" in output
    refused(run(*evaluate(sae, text), "--convention", "mine"), "must be one of ours, paper, saelens, got 'mine'")


def test_saelens_begins_windows_with_bos(folder: Path, text: Path, tmp_path: Path) -> None:
    tiny_tokenizer(bos=True).save_pretrained(folder)
    sae = an_sae(harvested(folder, text, tmp_path / "acts", "--layer", 1), tmp_path / "sae")
    assert evaluated(sae, text)[1]["bos"] is False
    _, settings, output = evaluated(sae, text, "--convention", "saelens")
    assert settings["bos"] is True
    assert "Windows of 16 tokens, each beginning with BOS" in output
    assert evaluated(sae, text, "--bos")[1]["bos"] is True


# Which text


def test_bos_and_special_tokens_are_as_asked_and_counted(folder: Path, text: Path, tmp_path: Path) -> None:
    tiny_tokenizer(adds_bos=True).save_pretrained(folder)
    shown = done(
        "harvest", "--model", folder, "--layer", 1, "--text", text, "--tokens", 300, "--window", WINDOW,
        "--skip-special", "--out", tmp_path / "acts",
    )  # fmt: skip
    assert re.search(r"left out 2\d by position and 0 by norm, \d+ special tokens", shown.output)
    store = ActivationStore.open(tmp_path / "acts")
    assert not set(store.tokens(slice(None)).tolist()) & {0, 1, BOS}
    assert evaluated(an_sae(store, tmp_path / "sae"), text)[1]["bos"] is True
    shown = done(
        "harvest", "--model", folder, "--layer", 1, "--text", text, "--tokens", 300, "--window", WINDOW,
        "--one-document", "--no-bos", "--out", tmp_path / "own",
    )  # fmt: skip
    assert re.search(r"\d+ documents shorter than a window", shown.output)


def test_other_kinds_of_text(folder: Path, text: Path, tmp_path: Path) -> None:
    lines = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    table = tmp_path / "text.csv"
    table.write_text("body\n" + "".join(f"{line}\n" for line in lines))
    rows = harvested(folder, text, tmp_path / "acts", "--layer", 1).rows(slice(None))
    same = harvested(folder, table, tmp_path / "table", "--layer", 1, "--text-field", "body").rows(slice(None))
    assert torch.equal(rows, same)
    refused(run("harvest", "--model", folder, "--layer", 1, "--text", table, "--window", 16, "--out", tmp_path / "new"),
            'no field "text", only body.*--text-field')  # fmt: skip


def test_a_single_document_says_at_once_how_to_use_it(folder: Path, text: Path, tmp_path: Path) -> None:
    sae = an_sae(harvested(folder, text, tmp_path / "acts", "--layer", 1), tmp_path / "sae")
    (tmp_path / "one.txt").write_text(" ".join(WORDS * 4))
    refused(run(*evaluate(sae, tmp_path / "one.txt")), "a single document: .*--split all")
    assert evaluated(sae, tmp_path / "one.txt", "--split", "all")[0]["tokens"] == 4 * (WINDOW - 1)


def test_windows_beyond_the_context(folder: Path, text: Path, tmp_path: Path) -> None:
    sae = an_sae(harvested(folder, text, tmp_path / "acts", "--layer", 1), tmp_path / "sae")
    refused(run(*evaluate(sae, text), "--window", 65), "context of 64 tokens, not 65")
