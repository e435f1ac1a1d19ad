"""Who scores: encoders. They read activations with a :class:`~expander_sae.dictionary.Matrix`; a sparsity rule selects.

A new encoder is a subclass here or in a plug-in, and its entry in :data:`ENCODERS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from expander_sae import pursuit
from expander_sae.dictionary import Dictionary, Matrix
from expander_sae.ops import Selection, SparseCode
from expander_sae.ops.fused import TiedError
from expander_sae.pursuit.support_gradient import least_squares_values
from expander_sae.pursuit.unrolled import unrolled_matching_pursuit
from expander_sae.registry import Registry, check_options
from expander_sae.stored import Section, take_tensor

UNROLLED = "mp-unrolled"


class Encoder(nn.Module, ABC):
    """Scores activations on a given matrix and hands the selected scores back as a code."""

    kind: str
    version: ClassVar[int] = 1
    ranks_features: ClassVar[bool] = True
    """Whether :meth:`code_among` works: AuxK needs it."""

    @abstractmethod
    def forward(
        self, matrix: Matrix, h: Tensor, center: Tensor, selection: Selection, *, check_finite: bool = False
    ) -> SparseCode:
        """The code of ``h (..., m)`` read about ``center (m,)``.

        Raises:
            ValueError: wrong width; with ``check_finite``, NaN or infinity in ``h``.
        """

    def fused_error(self, matrix: Matrix, h: Tensor, b_dec: Tensor, selection: Selection) -> TiedError | None:
        """Forward, squared error and its gradients in one call, where there is such a call; else ``None``."""
        return None

    def code_among(
        self, features: Tensor, matrix: Matrix, h: Tensor, center: Tensor, selection: Selection
    ) -> SparseCode:
        """The code on ``features (f,)`` alone, for AuxK; indices count within ``features``."""
        raise ValueError(f"AuxK ranks dead features by an encoder's scores; {self.kind!r} has none: set aux_k=0")

    def bias(self) -> Tensor | None:
        """What is added to the correlations, ``(n,)``; ``None`` for nothing."""
        return None

    def scores(self, features: Tensor, matrix: Matrix, h: Tensor, center: Tensor) -> Tensor:
        """All scores ``(B, f)`` of the named features ``(f,)``, bias included."""
        raise ValueError(f"a pursuit, such as {self.kind!r}, has no scores")

    def check(self, selection: Selection | None) -> None:
        """Raise ``ValueError`` for a sparsity rule this encoder cannot serve."""

    def signed(self, rule: bool) -> bool:
        """Whether codes may hold negative values, where those of the rule may (``rule``)."""
        return rule

    @property
    def num_values(self) -> int:
        """Learned values beside the dictionary's; biases not counted."""
        return 0

    def config(self) -> dict[str, Any]:
        """The section of ``config.json`` that, with :meth:`stored_tensors`, rebuilds the encoder."""
        return {"kind": self.kind, "version": self.version}

    def stored_tensors(self) -> dict[str, Tensor]:
        """What goes to disk."""
        return {}

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], dictionary: Dictionary) -> Self:
        """Rebuild from :meth:`config` and :meth:`stored_tensors`. Raises ``ValueError`` for what does not fit."""
        raise NotImplementedError

    def reset_features(self, features: Tensor, matrix: Matrix) -> None:
        """Start the named features afresh after their columns in ``matrix`` were."""

    def rescale_(self, factor: float) -> None:
        """Follow activations from ``factor · h`` to ``h``."""


class TiedEncoder(Encoder):
    """``z = Wᵀ(h - b_dec) + b_enc``, with the decoder's own ``W``."""

    kind = "tied"

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.b_enc = nn.Parameter(torch.zeros(d_sae))

    def bias(self) -> Tensor:
        return self.b_enc

    def own(self, matrix: Matrix) -> Matrix:
        """What the encoder reads with, given the decoder's matrix."""
        return matrix

    def forward(
        self, matrix: Matrix, h: Tensor, center: Tensor, selection: Selection, *, check_finite: bool = False
    ) -> SparseCode:
        return self.own(matrix).select(h, self.b_enc, selection, center=center, check_finite=check_finite)

    def fused_error(self, matrix: Matrix, h: Tensor, b_dec: Tensor, selection: Selection) -> TiedError | None:
        return matrix.tied_error(h, self.b_enc, b_dec, selection)

    def code_among(
        self, features: Tensor, matrix: Matrix, h: Tensor, center: Tensor, selection: Selection
    ) -> SparseCode:
        return self.own(matrix).subset(features).select(h, self.b_enc[features], selection, center=center)

    def scores(self, features: Tensor, matrix: Matrix, h: Tensor, center: Tensor) -> Tensor:
        return self.own(matrix).subset(features).correlate(h - center) + self.b_enc[features]

    def stored_tensors(self) -> dict[str, Tensor]:
        return {"b_enc": self.b_enc.detach()}

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], dictionary: Dictionary) -> Self:
        section.only("kind", "version")
        encoder = cls(dictionary.d_sae)
        encoder.b_enc = nn.Parameter(take_tensor(tensors, "b_enc", (dictionary.d_sae,)))
        return encoder

    @torch.no_grad()
    def reset_features(self, features: Tensor, matrix: Matrix) -> None:
        self.b_enc[features] = 0

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        self.b_enc /= factor


class UntiedEncoder(TiedEncoder):
    """``z = Vᵀ(h - b_dec) + b_enc`` with columns ``V`` of its own on the dictionary's supports.

    Args:
        values: one row for each feature, in the form of the dictionary's values; used as they are, not normalised.
    """

    kind = "untied"

    def __init__(self, values: Tensor) -> None:
        super().__init__(values.shape[0])
        self.values = nn.Parameter(values.contiguous())

    def own(self, matrix: Matrix) -> Matrix:
        return matrix.with_values(self.values)

    def fused_error(self, matrix: Matrix, h: Tensor, b_dec: Tensor, selection: Selection) -> None:
        return None

    @property
    def num_values(self) -> int:
        return self.values.numel()

    def stored_tensors(self) -> dict[str, Tensor]:
        return super().stored_tensors() | {"values": self.values.detach()}

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], dictionary: Dictionary) -> Self:
        section.only("kind", "version")
        encoder = cls(take_tensor(tensors, "values", tuple(dictionary.values.shape)))
        encoder.b_enc = nn.Parameter(take_tensor(tensors, "b_enc", (dictionary.d_sae,)))
        return encoder

    @torch.no_grad()
    def reset_features(self, features: Tensor, matrix: Matrix) -> None:
        super().reset_features(features, matrix)
        self.values[features] = matrix.values[features]


class PursuitEncoder(Encoder):
    """A pursuit on the decoder's own columns: no parameters, better codes than a linear encoder's.

    In training the code is found with the dictionary held still; gradients reach the dictionary through the decoder
    alone, which at a least-squares code is the whole gradient (the envelope theorem). To activations that ask for it
    the gradient flows on the fixed support.

    Args:
        solver: a name of :data:`expander_sae.pursuit.SOLVERS`.
        options: the solver's options, such as ``block`` or ``disjoint``.

    Raises:
        ValueError: unknown solver or option.
    """

    ranks_features = False

    def __init__(self, solver: str, options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.kind = solver
        self.options = dict(options or {})
        pursuit.check_options(solver, self.options)

    def forward(
        self, matrix: Matrix, h: Tensor, center: Tensor, selection: Selection, *, check_finite: bool = False
    ) -> SparseCode:
        # The solvers refuse what is not finite themselves, always.
        with torch.no_grad():
            code = pursuit.solver(self.kind)(h - center, matrix.detach(), selection.capacity, **self.options)
        if h.requires_grad and torch.is_grad_enabled():
            code = replace(code, values=least_squares_values(code, matrix.detach(), h, center.detach()))
        return code

    def check(self, selection: Selection | None) -> None:
        if selection is None or selection.threshold is not None or selection.rank != "signed":
            raise ValueError(
                f"the pursuit {self.kind!r} chooses features itself and takes their number only: use the sparsity rule "
                "'topk' without relu or rank; for codes that are not negative give the pursuit nonnegative=True"
            )

    def signed(self, rule: bool) -> bool:
        return not self.options.get("nonnegative", False)

    def config(self) -> dict[str, Any]:
        return super().config() | {"options": self.options}

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], dictionary: Dictionary) -> Self:
        section.only("kind", "version", "options")
        return cls(section.text("kind"), section.mapping("options"))


class UnrolledPursuit(PursuitEncoder):
    """MP-SAE's encoder (arXiv 2506.03093): matching pursuit with gradients through its rounds.

    The coefficients are those of the pursuit without a refit, and the gradient of the loss in them reaches the
    dictionary and ``b_dec`` beside the decoder's. See :mod:`expander_sae.pursuit.unrolled`.

    Args:
        solver: :data:`UNROLLED`.
        options: ``nonnegative`` (positive coefficients only) and ``reselect`` (a feature may be taken again, as in
            that paper); both ``False`` by default.

    Raises:
        ValueError: another option.
    """

    def __init__(self, solver: str = UNROLLED, options: Mapping[str, Any] | None = None) -> None:
        Encoder.__init__(self)
        self.kind = solver
        self.options = dict(options or {})
        check_options(f"the encoder {solver!r}", self.options, ("nonnegative", "reselect"))

    def forward(
        self, matrix: Matrix, h: Tensor, center: Tensor, selection: Selection, *, check_finite: bool = False
    ) -> SparseCode:
        return unrolled_matching_pursuit(matrix, h - center, selection.capacity, **self.options)


ENCODERS: Registry[type[Encoder]] = Registry("encoder")
"""Encoders by kind. Those of pursuits are made as ``cls(kind, options)``."""
ENCODERS.add("tied", TiedEncoder)
ENCODERS.add("untied", UntiedEncoder)
ENCODERS.add(UNROLLED, UnrolledPursuit)
for _name in pursuit.SOLVERS:
    ENCODERS.add(_name, PursuitEncoder)


def pursuit_encoder(kind: str, options: Mapping[str, Any] | None = None) -> PursuitEncoder:
    """The encoder by pursuit called ``kind``. Raises ``ValueError`` for another name or option."""
    found = ENCODERS[kind]
    if not issubclass(found, PursuitEncoder):
        raise ValueError(f"{kind!r} is no pursuit: it has values of its own to learn")
    return found(kind, options)
