"""Tiny random language models of several architectures, and a tokenizer that needs no hub."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from expander_sae.lm import LanguageModel

WORDS = [f"w{i}" for i in range(60)]
VOCAB = 64
LAYERS = 4
BOS = 62

_COMMON = {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "hidden_size": 32}
_GATED = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}

# GPT-J's and BLOOM's blocks return tuples, the others' tensors; GPT-2 and OPT add learned positions; Gemma 2
# scales the embeddings and alternates attention types by block number.
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON, intermediate_size=48, max_position_embeddings=64, **_IDS),
    "qwen2": lambda: transformers.Qwen2Config(**_GATED, **_IDS),
    "llama": lambda: transformers.LlamaConfig(**_GATED, **_IDS),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_layer=LAYERS, n_head=4, n_embd=32, n_positions=64, **_IDS
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **_GATED, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, **_IDS
    ),
    "opt": lambda: transformers.OPTConfig(
        **_COMMON, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, **_IDS
    ),
    "gptj": lambda: transformers.GPTJConfig(
        vocab_size=VOCAB, n_layer=LAYERS, n_head=4, n_embd=32, n_positions=64, rotary_dim=4, **_IDS
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB, n_layer=LAYERS, n_head=4, hidden_size=32, **_IDS),
}


def tiny_tokenizer(*, bos: bool = False, adds_bos: bool = False, **special: str | None) -> PreTrainedTokenizerFast:
    """One token for each word: ``w0`` … ``w59``, EOS is ``</s>`` (id 1).

    ``bos``: it has ``<s>`` (id 62); ``adds_bos``: and puts it before a text by itself. ``special``: other tokens.
    """
    vocabulary = {"<unk>": 0, "</s>": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    if bos or adds_bos:
        vocabulary["<s>"] = BOS
        special = {"bos_token": "<s>"} | special
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **{"eos_token": "</s>"} | special)


def tiny_lm(architecture: str = "llama", seed: int = 0, tokenizer: Any = None) -> LanguageModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    return LanguageModel(model, tokenizer=tokenizer or tiny_tokenizer(), name=f"tiny-{architecture}")


# Models whose blocks hand on more than one residual stream, which the shortcut of `continue_from` cannot know.
def shared_keys_lm() -> LanguageModel:
    """Gemma 4: the last two blocks use the keys and values of earlier ones."""
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(
        **_GATED, head_dim=8, num_kv_shared_layers=2, sliding_window=8, vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8, layer_types=["sliding_attention", "full_attention"] * 2, **_IDS,
    )  # fmt: skip
    return LanguageModel(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), "tiny-gemma4")


def several_streams_lm() -> LanguageModel:
    """Gemma 3n: blocks hand on ``(4, B, T, m)``."""
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        **_GATED, head_dim=8, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, altup_num_inputs=4,
        laurel_rank=4, num_kv_shared_layers=0, sliding_window=8, activation_sparsity_pattern=None,
        layer_types=["full_attention"] * LAYERS, **_IDS,
    )  # fmt: skip
    return LanguageModel(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), "tiny-gemma3n")


def router_state_lm(*, strict: bool = False) -> LanguageModel:
    """Llama whose blocks also hand a state for each token to the next block, beside the residual stream.

    ``strict``: a block fails without that state; otherwise it silently takes zeros.
    """
    lm = tiny_lm()
    state: dict[str, torch.Tensor] = {}

    class Routed(LlamaDecoderLayer):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
            out = super().forward(hidden_states, *args, **kwargs)
            before = state["router"] if strict and self is not lm.blocks[0] else state.get("router")
            out = out if before is None else out + 0.5 * before
            state["router"] = torch.tanh(out)
            return out

    for block in lm.blocks:
        block.__class__ = Routed
    lm.model.model.register_forward_pre_hook(lambda *_: state.clear())
    return lm


@pytest.fixture(scope="session", params=list(CONFIGS))
def any_lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_lm(request.param)


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return tiny_lm()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.randint(2, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))


class HubCache:
    """One model in a Hub cache: ``refs``, ``snapshots`` of links, ``blobs``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def commit(self, lm: LanguageModel, *revisions: str) -> str:
        """Add a snapshot of a model that ``revisions`` point to from now on; returns its commit."""
        with tempfile.TemporaryDirectory() as saved:
            lm.model.save_pretrained(saved)
            lm.tokenizer.save_pretrained(saved)
            files = {path.name: path.read_bytes() for path in Path(saved).iterdir()}
        commit = hashlib.sha1(b"".join(files.values())).hexdigest()
        snapshot = self.folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (self.folder / "blobs").mkdir(exist_ok=True)
        for name, content in files.items():
            blob = self.folder / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (snapshot / name).symlink_to(Path("..", "..", "blobs", blob.name))
        for revision in revisions:
            self.point(revision, commit)
        return commit

    def point(self, revision: str, commit: str) -> None:
        """Move a branch or tag."""
        (self.folder / "refs").mkdir(exist_ok=True)
        (self.folder / "refs" / revision).write_text(commit)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubCache:
    """The cache of ``owner/model``, the only one there is, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return HubCache(tmp_path / "hub" / "models--owner--model")
