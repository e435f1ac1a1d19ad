"""What is measured: sizes, activations and SAEs, the same for every contender and made anew from a seed."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from expander_sae.mask import Mask
from expander_sae.sae import SAE, Sparsity

_SPECTRUM_DECAY = 0.5  # the j-th principal direction has variance j^-2·decay: a residual stream's is close to 1/j
_BIAS_SCALE = 0.05


@dataclass(frozen=True)
class Shape:
    """Sizes of a case."""

    d_in: int
    d_sae: int
    degree: int
    k: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``"512x4096x7x64"``: width, features, degree, active features. ``ValueError`` for anything else."""
        if not re.fullmatch(r"\d+(x\d+){3}", text):
            raise ValueError(f"a size is d_in x d_sae x degree x k, such as 512x4096x7x64; got {text!r}")
        shape = cls(*(int(number) for number in text.split("x")))
        if not (1 <= shape.degree <= shape.d_in and 1 <= shape.k <= shape.d_sae):
            raise ValueError(f"{text}: degree must be from 1 to d_in, k from 1 to d_sae")
        return shape

    def __str__(self) -> str:
        return f"{self.d_in} × {self.d_sae:,}, d={self.degree}, k={self.k}"

    @property
    def dense_bytes(self) -> int:
        """One float32 copy of a dense dictionary."""
        return 4 * self.d_in * self.d_sae


_MILLION = "2048x1048576x7x64"
DEFAULT_SIZES: dict[str, tuple[str, ...]] = {
    "encode": ("512x4096x7x64", "576x4608x7x32", "2048x16384x7x64", "2048x16384x30x64", "2048x131072x7x64", _MILLION),
    "step": ("512x4096x7x64", "576x4608x7x32", "2048x16384x7x64", "2048x16384x30x64", "2048x131072x7x64"),
    "rules": ("512x4096x7x64", "2048x16384x7x64"),
    "pursuit": ("512x4096x7x64",),
    "public": ("512x4096x7x64", "576x4608x7x32", "2048x16384x7x64"),
    "memory": (_MILLION,),
    "theory": ("512x4096x7x64", "2048x16384x7x64", "2048x16384x30x64", "2048x131072x7x64"),
}
"""Suite to the sizes it runs at unless told otherwise."""


def activations(d_in: int, rows: int, seed: int = 0) -> Tensor:
    """``(rows, d_in)`` float32: Gaussian, correlated coordinates, a decaying spectrum, mean norm about ``√d_in``."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, d_in + 1).float().pow(-_SPECTRUM_DECAY)
    mixing = torch.randn(d_in, d_in, generator=generator) / scales.norm()
    return (torch.randn(rows, d_in, generator=generator) * scales) @ mixing


def expander_sae(shape: Shape, rule: Sparsity | None = None) -> SAE:
    """A tied expander SAE with unit columns in its parameters and biases that are not zero.

    ``rule``: in place of TopK with the field's ReLU.
    """
    mask = Mask.build("left-regular", d_in=shape.d_in, d_sae=shape.d_sae, degree=shape.degree)
    sae = SAE.expander(mask, shape.k, relu=True, sparsity=rule)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        values = sae.dictionary.values
        values /= values.norm(dim=1, keepdim=True)
        for name, parameter in sae.named_parameters():
            if name.endswith(("b_enc", "b_dec")):
                parameter.copy_(_BIAS_SCALE * torch.randn(parameter.shape, generator=generator))
    return sae


def dense_sae(shape: Shape, like: SAE) -> SAE:
    """The same SAE without a mask: untied, as every peer trains it, with the same columns and biases.

    Columns are normalised in the forward pass only where the rule needs it: it costs the dense step a pass over its
    weights.
    """
    rule = copy.deepcopy(like.sparsity)
    options = {"untied": True, "unit_norm": rule.needs_unit_norm, "sparsity": rule}
    sae = SAE.dense(shape.d_in, shape.d_sae, k=shape.k, **options)
    weight = like.dictionary.to_dense().T
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.endswith("values"):
                parameter.copy_(weight)
            else:
                parameter.copy_(like.get_parameter(name))
    return sae
