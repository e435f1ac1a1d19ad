"""Masks and figures that the tests of the theory share."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from expander_sae.dictionary import ExpanderMatrix
from expander_sae.mask import Mask

Array = np.ndarray


def random_mask(m: int, n: int, d: int, seed: int = 0) -> Mask:
    return Mask.build("left-regular", d_in=m, d_sae=n, degree=d, seed=seed)


def polynomial_mask(q: int, d: int, t: int, n: int) -> Mask:
    """Polynomials of degree below ``t`` over a prime field: two columns share at most ``t - 1`` rows."""
    points = np.arange(d)
    first = itertools.islice(itertools.product(range(q), repeat=t), n)
    rows = [points * q + sum(c * points**i for i, c in enumerate(f)) % q for f in first]
    return Mask.from_rows(np.array(rows), d * q)


def flat(mask: Mask, signs: int | None = None) -> ExpanderMatrix:
    """Columns of equal entries, of random signs if a seed is given."""
    values = torch.ones(mask.rows.shape)
    if signs is not None:
        values = torch.randint(0, 2, mask.rows.shape, generator=torch.Generator().manual_seed(signs)) * 2.0 - 1
    return ExpanderMatrix(mask.rows, values, mask.d_in)


def gaussian(mask: Mask, seed: int = 0) -> ExpanderMatrix:
    """Columns of Gaussian entries, not normalised."""
    values = torch.randn(mask.rows.shape, generator=torch.Generator().manual_seed(seed))
    return ExpanderMatrix(mask.rows, values, mask.d_in)


def dense_unit(matrix: ExpanderMatrix) -> Array:
    """``(m, n)`` float64, columns at unit norm."""
    whole = matrix.to_dense().double().numpy()
    return whole / np.linalg.norm(whole, axis=0)


def neighbours(rows: Array, sets: Array) -> Array:
    """``|N(S)|`` of each row of ``sets (B, s)``."""
    used = np.sort(rows[sets].reshape(len(sets), -1), axis=1)
    return 1 + (used[:, 1:] != used[:, :-1]).sum(axis=1)


def every_deficit(mask: Mask) -> Array:
    """``max C(S)`` of 1, 2, … columns, by looking at every set."""
    rows, n = mask.rows.numpy(), mask.d_sae
    sizes = range(1, n + 1)
    sets = (np.array(list(itertools.combinations(range(n), s))) for s in sizes)
    return np.array([mask.degree * s - neighbours(rows, of_size).min() for s, of_size in zip(sizes, sets, strict=True)])
