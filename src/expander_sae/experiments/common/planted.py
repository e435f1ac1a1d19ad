"""Planted problems: random values on a mask, random sparse codes, and how sure a share of solved ones is."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Generator

from expander_sae.dictionary import ExpanderDictionary, Matrix
from expander_sae.mask import Mask
from expander_sae.ops import SparseCode

Values = Literal["flat", "gaussian", "binary"]
Coefficients = Literal["gaussian", "signs"]


def random_matrix(mask: Mask, values: Values, generator: Generator) -> Matrix:
    """Columns of unit norm on ``mask``: ``"flat"`` has random signs, ``"binary"`` equal entries."""
    drawn = torch.randn(mask.rows.shape, generator=generator)
    chosen = {"flat": drawn.sign(), "gaussian": drawn, "binary": torch.ones_like(drawn)}[values]
    return ExpanderDictionary(mask, chosen).core().detach()


def random_code(n: int, k: int, count: int, coefficients: Coefficients, generator: Generator) -> SparseCode:
    """``count`` codes of ``k`` distinct features of ``n``, their coefficients standard Gaussian or ±1."""
    features = torch.rand(count, n, generator=generator).topk(k, dim=1).indices.to(torch.int32)
    amounts = torch.randn(count, k, generator=generator)
    return SparseCode(features, amounts.sign() if coefficients == "signs" else amounts)


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927); ``z = 1.96`` for 95 %."""
    centre = (successes + z * z / 2) / (trials + z * z)
    half = z * math.sqrt(successes * (trials - successes) / trials + z * z / 4) / (trials + z * z)
    return max(0.0, centre - half), min(1.0, centre + half)
