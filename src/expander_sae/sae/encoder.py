"""Encoders: how centred activations become a sparse code on a :class:`~expander_sae.dictionary.Matrix`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from expander_sae import pursuit
from expander_sae.dictionary import Dictionary, Matrix, dictionary_from
from expander_sae.ops import SparseCode
from expander_sae.pursuit.unrolled import unrolled_matching_pursuit

UNROLLED = "mp-unrolled"


class Encoder(nn.Module):
    """Turns centred activations ``h - b_dec`` into a code of ``k`` features on a given matrix."""

    k: int
    kind: str
    own: Dictionary | None
    """Columns of its own, if the encoder does not read with the decoder's."""

    def __init__(self, d_sae: int, k: int) -> None:
        super().__init__()
        k = operator.index(k)  # a numpy integer is no JSON
        if not 1 <= k <= d_sae:
            raise ValueError(f"k must be between 1 and d_sae = {d_sae}, got {k}: a code cannot have more features")
        self.k = k
        self.own = None  # on the instance: a class attribute would hide the module that a subclass registers

    def forward(self, matrix: Matrix, centred: Tensor) -> SparseCode:
        """The code of ``centred (..., m)``."""
        raise NotImplementedError

    def code_among(self, features: Tensor, matrix: Matrix, centred: Tensor, k: int) -> SparseCode:
        """The best ``k`` among ``features (f,)``, for AuxK; indices count within ``features``."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """What, with :meth:`stored_tensors`, rebuilds the encoder."""
        raise NotImplementedError

    def stored_tensors(self) -> dict[str, Tensor]:
        """What goes to disk."""
        return {}

    def reset_features(self, features: Tensor, matrix: Matrix) -> None:
        """Start the named features afresh after their columns in ``matrix`` were."""

    def rescale_(self, factor: float) -> None:
        """Follow activations from ``factor · h`` to ``h``."""


class TopKEncoder(Encoder):
    """``x = TopK_k(z)``, ``z = Wᵀ(h - b_dec) + b_enc`` with the decoder's own ``W`` (tied) or one of its own (untied).

    The paper ranks by signed ``z`` without a ReLU. ``relu`` clips the chosen values at 0, the field's habit.

    Args:
        d_sae: features ``n``.
        k: active features a sample.
        relu: clip after the selection.
        own: the untied encoder's columns; ``None`` ties it to the decoder.
    """

    def __init__(self, d_sae: int, k: int, *, relu: bool = False, own: Dictionary | None = None) -> None:
        super().__init__(d_sae, k)
        self.relu = relu
        self.own = own
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.kind = "tied" if own is None else "untied"

    def forward(self, matrix: Matrix, centred: Tensor) -> SparseCode:
        own = matrix if self.own is None else self.own.matrix()
        return own.topk(centred, self.b_enc, self.k, relu=self.relu)

    def code_among(self, features: Tensor, matrix: Matrix, centred: Tensor, k: int) -> SparseCode:
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
        # No bias, and an own column equal to the decoder's.
        self.b_enc[features] = 0
        if self.own is not None:
            self.own.point_at(features, matrix.columns(features))

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        self.b_enc /= factor


class PursuitEncoder(Encoder):
    """A pursuit on the decoder's own columns: no parameters, better codes than a TopK encoder's.

    In training the code is found with the dictionary held still; gradients reach the dictionary through the decoder
    alone, which at a least-squares code is the whole gradient (the envelope theorem).

    Args:
        d_sae: features ``n``.
        k: the most active features a sample.
        solver: a name of :data:`expander_sae.pursuit.SOLVERS`.
        options: the solver's options, such as ``block`` or ``disjoint``.

    Raises:
        ValueError: ``k`` outside ``[1, d_sae]``, unknown solver or option.
    """

    def __init__(self, d_sae: int, k: int, solver: str, options: dict[str, Any] | None = None) -> None:
        super().__init__(d_sae, k)
        self.kind = solver
        self.options = dict(options or {})
        pursuit.check_options(solver, self.options)

    @torch.no_grad()
    def forward(self, matrix: Matrix, centred: Tensor) -> SparseCode:
        return pursuit.solver(self.kind)(centred, matrix.detach(), self.k, **self.options)

    def code_among(self, features: Tensor, matrix: Matrix, centred: Tensor, k: int) -> SparseCode:
        raise ValueError(
            "AuxK ranks dead features by an encoder's scores; a pursuit has none: set aux_k=0 and resample instead"
        )

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "sparsity": "pursuit", "k": self.k, "options": self.options}


class UnrolledPursuit(PursuitEncoder):
    """MP-SAE's encoder (arXiv 2506.03093): matching pursuit with gradients through its rounds.

    The coefficients are those of the pursuit without a refit, and the gradient of the loss in them reaches the
    dictionary and ``b_dec`` beside the decoder's. See :mod:`expander_sae.pursuit.unrolled`.

    Args:
        d_sae: features ``n``.
        k: rounds.
        options: ``nonnegative`` (positive coefficients only) and ``reselect`` (a feature may be taken again, as in
            that paper); both ``False`` by default.

    Raises:
        ValueError: ``k`` outside ``[1, d_sae]``, or another option.
    """

    def __init__(self, d_sae: int, k: int, options: dict[str, Any] | None = None) -> None:
        check_pursuit(UNROLLED, dict(options or {}))
        super().__init__(d_sae, k, "matching-pursuit", options)
        self.kind = UNROLLED

    def forward(self, matrix: Matrix, centred: Tensor) -> SparseCode:
        return unrolled_matching_pursuit(matrix, centred, self.k, **self.options)


PURSUITS = (*pursuit.SOLVERS, UNROLLED)
"""What an encoder by pursuit may be called."""


def pursuit_encoder(d_sae: int, k: int, kind: str, options: dict[str, Any] | None = None) -> PursuitEncoder:
    """The encoder called ``kind``, one of :data:`PURSUITS`. Raises ``ValueError`` as its class does."""
    return UnrolledPursuit(d_sae, k, options) if kind == UNROLLED else PursuitEncoder(d_sae, k, kind, options)


def check_pursuit(kind: str, options: dict[str, Any]) -> None:
    """Raise ``ValueError`` for an unknown pursuit or an option it does not take."""
    if kind != UNROLLED:
        pursuit.check_options(kind, options)
    elif unknown := sorted(set(options) - {"nonnegative", "reselect"}):
        raise ValueError(f"{UNROLLED!r} has no option {unknown[0]!r}; it takes 'nonnegative', 'reselect'")


def encoder_from(config: dict[str, Any], tensors: dict[str, Tensor], d_in: int, d_sae: int) -> Encoder:
    """Rebuild an encoder from its config and stored tensors.

    Raises:
        ValueError: unknown kind or option, or a missing tensor.
    """
    kind, sparsity = config["kind"], config["sparsity"]
    if sparsity == "pursuit":
        return pursuit_encoder(d_sae, config["k"], kind, config["options"])
    if kind not in ("tied", "untied") or sparsity != "topk":
        raise ValueError(f"unknown encoder {kind!r} with sparsity {sparsity!r}; upgrade expander-sae")
    own = None
    if config["dictionary"] is not None:
        prefix = "encoder."
        stored = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        own = dictionary_from(config["dictionary"], stored, d_in)
    encoder = TopKEncoder(d_sae, config["k"], relu=config["relu"], own=own)
    if "b_enc" not in tensors:
        raise ValueError("the encoder lacks 'b_enc'")
    if tensors["b_enc"].shape != (d_sae,):
        raise ValueError(f"b_enc should have shape ({d_sae},), it has {tuple(tensors['b_enc'].shape)}")
    encoder.b_enc = nn.Parameter(tensors["b_enc"].contiguous())
    return encoder
