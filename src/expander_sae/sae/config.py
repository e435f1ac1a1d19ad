"""Which SAE to build: one choice on each axis, with its options."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

from expander_sae.mask import CONSTRUCTIONS, Mask
from expander_sae.registry import check_options, unknown
from expander_sae.sae.encoder import ENCODERS, pursuit_encoder
from expander_sae.sae.sae import SAE
from expander_sae.sae.sparsity import SPARSITIES, Sparsity

LINEAR = ("tied", "untied")


@dataclass(frozen=True)
class SAEConfig:
    """Which SAE to build."""

    dictionary: Literal["expander", "dense"] = "expander"
    """``expander`` (columns on a mask) or ``dense``."""
    d_sae: int = 4096
    """Features."""
    k: int = 64
    """Active features per sample."""
    degree: int = 7
    """Rows each column of an expander uses."""
    mask: str = "left-regular"
    """How the mask is drawn: ``left-regular`` (the paper's), or another kind of mask."""
    mask_options: dict[str, Any] = field(default_factory=dict)
    """Options of the mask."""
    basis: Literal["standard", "random", "pca"] = "standard"
    """What the columns are written in: ``standard`` (the model's own coordinates), ``pca`` (the principal axes of the
    activations, ``d_in²`` stored values) or ``random`` (a control)."""
    encoder: str = "tied"
    """``tied`` (reads with the decoder's values), ``untied`` (with its own), the name of a pursuit, such as ``omp``, or
    ``mp-unrolled`` (matching pursuit with gradients through it)."""
    encoder_options: dict[str, Any] = field(default_factory=dict)
    """Options of the pursuit, such as ``{block: 8, disjoint: true}``."""
    sparsity: str = "topk"
    """Who selects: ``topk``, ``batch-topk``, ``relu-l1``, ``jumprelu`` or ``gated``."""
    sparsity_options: dict[str, Any] = field(default_factory=dict)
    """Options of the rule, such as ``{relu: true}``: only positive scores."""
    seed: int = 0
    """Draws the mask and the initial values, and orders the batches."""

    def __post_init__(self) -> None:
        if self.encoder in LINEAR:
            check_options(f"the {self.encoder} encoder", self.encoder_options, ())
        elif self.encoder not in ENCODERS:
            raise ValueError(unknown("encoder", self.encoder, ENCODERS))
        else:
            pursuit_encoder(self.encoder, self.encoder_options)
        check_options(f"mask kind {self.mask!r}", self.mask_options, CONSTRUCTIONS[self.mask].options)
        takes = list(inspect.signature(SPARSITIES[self.sparsity].__init__).parameters)[3:]
        check_options(f"the sparsity rule {self.sparsity!r}", self.sparsity_options, takes)

    def build(self, d_in: int) -> SAE:
        """The untrained SAE, in the coordinates of the basis; :func:`expander_sae.training.build_sae` adds the basis.

        Raises:
            ValueError: sizes that do not fit.
        """
        if self.d_sae < 1:
            raise ValueError(f"d_sae must be at least 1, got {self.d_sae}")
        rule: Sparsity = SPARSITIES[self.sparsity](self.d_sae, self.k, **self.sparsity_options)
        untied = self.encoder == "untied"
        if self.dictionary == "dense":
            sae = SAE.dense(d_in, self.d_sae, k=self.k, untied=untied, seed=self.seed, sparsity=rule)
        else:
            sizes = {"d_in": d_in, "d_sae": self.d_sae, "degree": self.degree}
            mask = Mask.build(self.mask, **sizes, seed=self.seed, **self.mask_options)
            sae = SAE.expander(mask, self.k, untied=untied, seed=self.seed, sparsity=rule)
        if self.encoder in LINEAR:
            return sae
        return SAE(sae.dictionary, pursuit_encoder(self.encoder, self.encoder_options), rule)
