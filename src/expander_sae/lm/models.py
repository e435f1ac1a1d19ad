"""A language model of ``transformers``, and where its decoder blocks are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from expander_sae.lm.identity import tokenizer_hash

_COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class LanguageModel:
    """A causal language model, its tokenizer, and where its decoder blocks are.

    ``name`` is the hub id, the absolute path of a folder, or ``"embedded"``; ``revision`` the commit, or the
    fingerprint for a folder; ``weights`` a fingerprint of the weight files, of a Hub model too (None: unknown).
    ``tokenizer`` may be None for a model that is given token ids only. Parameters are frozen: no graph is recorded
    unless a spliced replacement itself asks for gradients.

    Raises ``TypeError`` if no list of decoder blocks can be found in the model.
    """

    model: Any  # a transformers PreTrainedModel with a language-model head
    tokenizer: Any
    name: str
    revision: str | None = None
    weights: str | None = None
    blocks: nn.ModuleList = field(init=False, repr=False)
    _tokenizer_hash: str | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self.blocks = find_blocks(self.model)
        self.model.eval()
        self.model.requires_grad_(False)

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks; layers are numbered from 0."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(_text_config(self.model).hidden_size)

    @property
    def device(self) -> torch.device:
        """Where token ids go in: the device of the embeddings."""
        device = self.model.get_input_embeddings().weight.device
        return torch.device("cpu") if device.type == "meta" else device  # meta: offloaded, and fetched when needed

    @property
    def dtype(self) -> torch.dtype:
        """The floating type that hidden states have: that of the parameters which are not quantised."""
        return next(p.dtype for p in self.model.parameters() if p.dtype in _COMPUTED)

    @property
    def context(self) -> int | None:
        """The longest window the model is made for, in tokens; None if its config names none."""
        return getattr(_text_config(self.model), "max_position_embeddings", None)

    @property
    def tokenizer_hash(self) -> str | None:
        """A hash of the tokenizer's vocabulary and special tokens, as they were when it was first asked for."""
        if self._tokenizer_hash is None:
            self._tokenizer_hash = tokenizer_hash(self.tokenizer)
        return self._tokenizer_hash

    def check_window(self, window: int) -> int:
        """Return ``window``, or raise ``ValueError`` if it is no length this model reads."""
        if window < 2 or (self.context and window > self.context):
            raise ValueError(f"window must be from 2 to the model's context of {self.context} tokens, not {window}")
        return window

    def check_layer(self, layer: int) -> int:
        """Return ``layer``, or raise ``ValueError`` with the valid range."""
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.num_layers:
            raise ValueError(
                f"{self.name} has no layer {layer!r}: it has {self.num_layers} blocks, "
                f"so layer must be an integer from 0 to {self.num_layers - 1}."
            )
        return layer


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's decoder blocks: the outermost ``ModuleList`` with one entry per hidden layer.

    Found by structure, not by name, so GPT-NeoX's ``gpt_neox.layers``, Llama's ``model.layers``, GPT-2's
    ``transformer.h`` and OPT's ``model.decoder.layers`` need no table. In a model with several towers the
    text decoder is searched first.

    Raises ``TypeError`` if there is none.
    """
    count = _text_config(model).num_hidden_layers
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    for root in (decoder, model):
        if not isinstance(root, nn.Module):
            continue
        found = [
            (name.count("."), module)
            for name, module in root.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if found:
            return min(found, key=lambda pair: pair[0])[1]
    raise TypeError(
        f"{type(model).__name__} has no list of {count} decoder blocks (its config's num_hidden_layers), "
        "so no layer can be hooked. Use a decoder-only causal language model."
    )


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()
