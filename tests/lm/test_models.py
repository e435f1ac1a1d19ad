"""Loading models: folders, dtypes, the blocks' place, and what goes wrong."""

from __future__ import annotations

import pytest
import torch
from support.lm import CONFIGS, LAYERS, tiny_lm
from torch import nn

from expander_sae.lm import PRESETS, ModelError, find_blocks, load_model, preset_for, residual
from expander_sae.lm import models as models_module


@pytest.fixture
def folder(lm, tmp_path):
    lm.model.save_pretrained(tmp_path / "tiny")
    lm.tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


PLACES = {
    "gpt_neox": lambda model: model.gpt_neox.layers,
    "qwen2": lambda model: model.model.layers,
    "llama": lambda model: model.model.layers,
    "gpt2": lambda model: model.transformer.h,
    "gemma2": lambda model: model.model.layers,
    "opt": lambda model: model.model.decoder.layers,
    "gptj": lambda model: model.transformer.h,
    "bloom": lambda model: model.transformer.h,
}


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_blocks_and_width(architecture):
    lm = tiny_lm(architecture)
    assert lm.blocks is PLACES[architecture](lm.model)
    assert (lm.num_layers, lm.d_model) == (LAYERS, 32)


def test_the_outermost_list_is_taken():
    """Lists inside the blocks (experts, say) may have as many entries as there are blocks."""
    lm = tiny_lm()
    lm.blocks[0].experts = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
    assert find_blocks(lm.model) is lm.model.model.layers


def test_a_model_without_blocks():
    lm = tiny_lm()
    lm.model.model.layers = nn.ModuleList(lm.blocks[:2])
    with pytest.raises(TypeError, match="no list of 4 decoder blocks"):
        find_blocks(lm.model)


def test_load_from_a_folder(lm, folder, tokens):
    loaded = load_model(folder, dtype="float32", device="cpu")
    assert torch.equal(residual(loaded, tokens, 2), residual(lm, tokens, 2))
    assert loaded.tokenizer.eos_token_id == 1
    assert loaded.name == str(folder)
    assert not loaded.model.training
    assert load_model(folder, dtype="bfloat16", device="cpu").dtype == torch.bfloat16


def test_a_folders_revision_is_its_weights(folder):
    first = load_model(folder, dtype="float32", device="cpu").revision
    assert load_model(folder, dtype="bfloat16", device="cpu").revision == first
    tiny_lm(seed=1).model.save_pretrained(folder)
    assert load_model(folder, dtype="float32", device="cpu").revision != first


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
    ],
)
def test_auto_dtype_follows_the_cpu(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert models_module.preferred_dtype(torch.device("cpu")) == expected


@pytest.mark.parametrize(
    "error",
    [
        OSError("We couldn't connect to the hub to load the files"),
        ValueError("Unrecognized model in some/model"),
    ],
)
def test_an_unreachable_hub_says_what_to_do(monkeypatch, error):
    def fail(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    with pytest.raises(ModelError, match=r"(?s)some/model.*connection.*local folder.*'embedded'"):
        load_model("some/model")


def test_a_gated_model_says_how_to_log_in(monkeypatch):
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("You are trying to access a gated repo.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    with pytest.raises(ModelError, match="licence"):
        load_model("meta-llama/Llama-3.2-1B")


def test_bad_names(tmp_path, folder):
    with pytest.raises(ModelError, match="not a model folder"):
        load_model(tmp_path / "missing")
    with pytest.raises(ModelError, match="not a model folder"):
        load_model(folder / "config.json")
    with pytest.raises(ModelError, match="transformers can read"):
        load_model(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="transformers can read"):
        load_model(folder)
    with pytest.raises(ValueError, match="dtype must be"):
        load_model(folder, dtype="int8")  # type: ignore[arg-type]


def test_presets():
    """The paper's layers, widths, sparsities and degrees."""
    assert preset_for("EleutherAI/pythia-70m") is PRESETS["pythia-70m"]
    assert preset_for("Llama-3.2-1B") is PRESETS["llama-3.2-1b"]
    assert preset_for("gpt2") is None
    qwen = PRESETS["qwen2.5-3b"]
    assert (qwen.layers, qwen.d_sae, qwen.k, qwen.degrees) == ((12, 24), 16384, 64, (7, 30, 102))
    for preset in PRESETS.values():
        assert preset.k < preset.d_sae
        assert all(degree >= 1 for degree in preset.degrees)


def test_a_presets_short_name_loads_its_hub_id(monkeypatch):
    asked = []

    def fail(source: str, **_kwargs: object) -> None:
        asked.append(source)
        raise OSError("offline")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    with pytest.raises(ModelError):
        load_model("pythia-160m")
    assert asked == ["EleutherAI/pythia-160m"]
