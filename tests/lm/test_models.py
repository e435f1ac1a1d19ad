"""Loading models: folders, dtypes, the blocks' place, and what goes wrong."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from support.lm import CONFIGS, LAYERS, tiny_lm
from torch import nn

from expander_sae.lm import MODELS, ModelError, find_blocks, load_model, preset_for, residual
from expander_sae.lm import load as load_module


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
    assert load_module.preferred_dtype(torch.device("cpu")) == expected


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
    assert preset_for("EleutherAI/pythia-70m-deduped") is MODELS["pythia-70m"]
    assert (
        preset_for("EleutherAI/pythia-70m") is None
    )  # other weights: the paper's were trained on the deduplicated Pile
    assert preset_for("Llama-3.2-1B") is MODELS["llama-3.2-1b"]
    assert preset_for("gpt2") is None
    qwen = MODELS["qwen2.5-3b"]
    assert (qwen.layers, qwen.d_sae, qwen.k, qwen.degrees) == ((12, 24), 16384, 64, (7, 30, 102))
    for preset in MODELS.values():
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
    assert asked == ["EleutherAI/pythia-160m-deduped"]


# Options and what cannot be loaded


def test_a_folder_is_known_by_its_absolute_path(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_model("tiny", dtype="float32", device="cpu").name == str(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_model("~/tiny", dtype="float32", device="cpu").name == str(folder)
    with pytest.raises(ValueError, match="folder, which has no revisions"):
        load_model(folder, revision="main")


def test_a_device_map(lm, folder, tokens, monkeypatch):
    pytest.importorskip("accelerate")
    loaded = load_model(folder, dtype="float32", device_map={"": "cpu"})
    assert torch.equal(residual(loaded, tokens, 2), residual(lm, tokens, 2))
    with pytest.raises(ValueError, match="device or device_map, not both"):
        load_model(folder, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="'everywhere' is no device torch knows"):
        load_model(folder, device_map="everywhere")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"'cuda:0' was asked for, but torch .* sees no CUDA device"):
        load_model(folder, device_map="cuda:0")


def test_quantising_says_what_it_needs(folder, monkeypatch):
    with pytest.raises(ValueError, match="quantize must be 8bit or 4bit, not '2bit'"):
        load_model(folder, quantize="2bit")  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="quantize 8bit needs the package bitsandbytes"):
        load_model(folder, quantize="8bit")


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, ImportError, "needs more than is installed: .*GPTQ"),
        ({"quant_method": "mine"}, ModelError, "stored quantised by 'mine', which this version of transformers cannot"),
    ],
    ids=["gptq", "unknown"],
)
def test_a_model_stored_quantised_that_cannot_be_read_here(folder, method, error, message):
    if find_spec("optimum") is not None and method["quant_method"] == "gptq":
        pytest.skip("optimum is installed")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": method}))
    with pytest.raises(error, match=f"language model .*{message}"):
        load_model(folder, device="cpu")


def test_weights_that_are_missing_are_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    kept = tensors.pop("model.layers.0.mlp.down_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, such as model\.layers\.0\.mlp\.down_proj\.weight"):
        load_model(folder, device="cpu")
    tensors["model.layers.0.mlp.down_proj.weight"] = kept[:1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="Could not load the language model"):
        load_model(folder, device="cpu")


def test_the_dtype_of_a_quantised_model_is_that_of_its_other_parameters():
    lm = tiny_lm()
    head = torch.zeros(4, dtype=torch.int8)
    lm.model.register_parameter("aaa", nn.Parameter(head, requires_grad=False))
    assert next(lm.model.parameters()).dtype == torch.int8
    assert lm.dtype == torch.float32


def test_a_device_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"'cuda' was asked for, but torch .* sees no CUDA device"):
        load_model(folder, device="cuda")
    with pytest.raises(ValueError, match="'abacus' is no device torch knows"):
        load_model(folder, device="abacus")


def test_an_adapter_is_named_as_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(ModelError, match=r"(?s)is an adapter \(LoRA, PEFT\) for owner/base.*merge_and_unload"):
        load_model(tmp_path)


def test_an_adapter_on_the_hub_is_named_as_one(hub):
    commit = hub.commit(tiny_lm(), "main")
    (hub.folder / "snapshots" / commit / "config.json").unlink()
    (hub.folder / "snapshots" / commit / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(ModelError, match=r"owner/model is an adapter \(LoRA, PEFT\) for owner/base"):
        load_model("owner/model")


def test_a_model_without_tokenizer(lm, tmp_path, folder):
    lm.model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"(?s)bare has no tokenizer that transformers can read.*--tokenizer"):
        load_model(tmp_path / "bare", device="cpu")
    loaded = load_model(tmp_path / "bare", device="cpu", tokenizer=folder)
    assert loaded.tokenizer_hash == lm.tokenizer_hash


def test_code_that_comes_with_a_model_is_run_when_trusted(lm, folder):
    settings = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "mine", "auto_map": code}))
    (folder / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n\n\n"
        "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(folder, device="cpu")
    loaded = load_model(folder, device="cpu", dtype="float32", trust_remote_code=True)
    assert type(loaded.model).__name__ == "MyModel"
