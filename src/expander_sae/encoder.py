"""Encoders: how activations become a sparse code. They see a :class:`~expander_sae.dictionary.Matrix` and centred input."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from expander_sae.dictionary import Dictionary, Matrix, dictionary_from
from expander_sae.ops import SparseCode


class TopKEncoder(nn.Module):
    """``x = TopK_k(z)``, ``z = Wᵀ(h - b_dec) + b_enc`` with the decoder's own ``W`` (tied) or one of its own (untied).

    The paper ranks by signed ``z`` without a ReLU. ``relu`` clips the chosen values at 0, the field's habit.

    Args:
        d_sae: features ``n``.
        k: active features a sample.
        relu: clip after the selection.
        own: the untied encoder's columns; ``None`` ties it to the decoder.
    """

    def __init__(self, d_sae: int, k: int, *, relu: bool = False, own: Dictionary | None = None) -> None:
        super().__init__()
        k = operator.index(k)  # a numpy integer is no JSON
        if not 1 <= k <= d_sae:
            raise ValueError(f"k must be between 1 and d_sae = {d_sae}, got {k}: a code cannot have more features")
        self.k = k
        self.relu = relu
        self.own = own
        self.b_enc = nn.Parameter(torch.zeros(d_sae))

    @property
    def kind(self) -> str:
        return "tied" if self.own is None else "untied"

    def forward(self, matrix: Matrix, centred: Tensor) -> SparseCode:
        """The code of ``centred = h - b_dec``, ``(..., m)``."""
        own = matrix if self.own is None else self.own.matrix()
        return own.topk(centred, self.b_enc, self.k, relu=self.relu)

    def code_among(self, features: Tensor, matrix: Matrix, centred: Tensor, k: int) -> SparseCode:
        """The best ``k`` among ``features (f,)``; indices count within ``features``."""
        own = matrix if self.own is None else self.own.matrix()
        return own.subset(features).topk(centred, self.b_enc[features], k, relu=self.relu)

    def config(self) -> dict[str, Any]:
        own = None if self.own is None else self.own.config()
        return {"kind": self.kind, "sparsity": "topk", "k": self.k, "relu": self.relu, "dictionary": own}

    def stored_tensors(self) -> dict[str, Tensor]:
        own = {} if self.own is None else self.own.stored_tensors()
        return {"b_enc": self.b_enc.detach()} | {f"encoder.{name}": tensor for name, tensor in own.items()}

    @torch.no_grad()
    def reset_features(self, features: Tensor, matrix: Matrix) -> None:
        """Start the named features afresh: no bias, an own encoder column equal to the decoder's."""
        self.b_enc[features] = 0
        if self.own is not None:
            self.own.point_at(features, matrix.columns(features))


def encoder_from(config: dict[str, Any], tensors: dict[str, Tensor], d_in: int, d_sae: int) -> TopKEncoder:
    """Rebuild an encoder from its config and stored tensors."""
    kind = config["kind"]
    if kind not in ("tied", "untied") or config["sparsity"] != "topk":
        raise ValueError(
            f"unknown encoder {kind!r} with sparsity {config['sparsity']!r}; this version knows 'tied' and 'untied' with 'topk'"
        )
    own = None
    if config["dictionary"] is not None:
        prefix = "encoder."
        stored = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        own = dictionary_from(config["dictionary"], stored, d_in)
    encoder = TopKEncoder(d_sae, config["k"], relu=config["relu"], own=own)
    if "b_enc" not in tensors:
        raise ValueError("the encoder lacks 'b_enc'")
    encoder.b_enc = nn.Parameter(tensors["b_enc"].contiguous())
    return encoder
