"""Tiny random language models of several architectures, and a tokenizer that needs no hub."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from expander_sae.lm import LanguageModel

WORDS = [f"w{i}" for i in range(60)]
VOCAB = 64
LAYERS = 4

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


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: ``w0`` … ``w59``, EOS is ``</s>`` (id 1)."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def tiny_lm(architecture: str = "llama", seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    return LanguageModel(model, tokenizer=tiny_tokenizer(), name=f"tiny-{architecture}")


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
