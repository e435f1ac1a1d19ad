"""Flatness and coherence: exact, levels certified with a margin, and what they promise kept by OMP."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from support.theory import dense_unit, flat, gaussian, polynomial_mask, random_mask

from expander_sae.dictionary import DenseMatrix, ExpanderMatrix, Matrix
from expander_sae.pursuit import omp
from expander_sae.theory import below_one, coherence, expansion_deficits, flatness, squared_flatness

MASK = random_mask(40, 60, 5)


def truth(columns: np.ndarray, s: int) -> float:
    gram = np.abs(columns.T @ columns)
    np.fill_diagonal(gram, 0)
    return float(np.sort(gram, axis=1)[:, gram.shape[1] - s :].sum(axis=1).max())


@pytest.mark.parametrize("matrix", [flat(MASK), flat(MASK, signs=1), gaussian(MASK)], ids=["ones", "signs", "gaussian"])
def test_sums_are_those_of_the_gram_matrix(matrix: ExpanderMatrix) -> None:
    dense = dense_unit(matrix)
    other: Matrix = DenseMatrix(matrix.to_dense().T.contiguous())
    for known in (coherence(matrix, 60), coherence(other, 60)):
        for s in range(61):
            assert float(known.at(s)) == pytest.approx(truth(dense, min(s, 59)), abs=1e-12)
    assert isinstance(coherence(matrix, 3).at(2), Fraction) == (matrix is not None and squared_flatness(matrix) == 1)


def test_columns_are_normalised_and_zero_columns_certify_nothing() -> None:
    matrix = gaussian(MASK)
    scaled = matrix.with_values(matrix.values * torch.logspace(-30, 30, 60).unsqueeze(1))
    np.testing.assert_allclose(np.array(coherence(scaled, 9).sums), np.array(coherence(matrix, 9).sums), rtol=1e-5)
    values = flat(polynomial_mask(7, 5, 2, 49)).values.clone()
    values[3] = 0
    known = coherence(ExpanderMatrix(polynomial_mask(7, 5, 2, 49).rows, values, 35), 9)
    assert known.zero_columns == 1
    assert known.omp_level == known.unique_level == 0
    assert math.isinf(known.coefficient_to_noise(1))


def test_seven_sevenths_is_not_below_one() -> None:
    """On flat columns of overlap 1 and degree 7, ``μ₁(3) + μ₁(4)`` is 1; a sum of floats may say less."""
    matrix = flat(polynomial_mask(11, 7, 2, 121))
    gram = dense_unit(matrix)
    assert truth(gram, 3) + truth(gram, 4) < 1  # the trap
    known = coherence(matrix, 9)
    assert known.recovery(4) == Fraction(7, 7)
    assert not known.recovers(4)
    assert not known.identifies(4)
    assert known.omp_level == known.unique_level == 3
    # The same columns where a rounding hides that they are flat: the margin refuses.
    bent = matrix.with_values(matrix.values + 1e-7 * torch.eye(121, 7))
    assert isinstance(coherence(bent, 9).recovery(4), float)
    assert coherence(bent, 9).omp_level == 3
    assert below_one(1 - 1e-8)
    assert not below_one(1 - 1e-12)
    assert not below_one(Fraction(1))
    assert below_one(Fraction(10**12 - 1, 10**12))


def test_what_is_not_known_is_not_guessed() -> None:
    known = coherence(gaussian(MASK), 4)
    with pytest.raises(ValueError, match="only up to"):
        known.at(5)
    with pytest.raises(ValueError, match="at least 1"):
        coherence(gaussian(MASK), 0)
    orthogonal = coherence(DenseMatrix(torch.eye(6)), 12)
    assert orthogonal.omp_level == 6
    assert orthogonal.at(6) == 0


def test_flatness() -> None:
    values = torch.tensor([[1.0, 1, -1, 1], [0, 0, 2, 0], [0, 0, 0, 0], [3, 4, 0, 0]])
    matrix = ExpanderMatrix(torch.arange(16, dtype=torch.int32).reshape(4, 4), values, 16)
    beta = flatness(matrix)
    assert beta is not None
    np.testing.assert_allclose(beta, [1, 2, math.nan, 1.6])
    assert squared_flatness(matrix) == pytest.approx(4)
    assert squared_flatness(flat(MASK, signs=2)) == Fraction(1)
    assert flatness(DenseMatrix(torch.eye(3))) is None
    # F2: ‖w‖₁ ≥ √d / β.
    columns, size = dense_unit(gaussian(MASK)), flatness(gaussian(MASK))
    assert size is not None
    assert (np.abs(columns).sum(axis=0) >= math.sqrt(5) / size.numpy() - 1e-12).all()


@pytest.mark.parametrize("signs", [None, 1])
def test_t9_with_the_package_s_own_figures(signs: int | None) -> None:
    for matrix in (flat(MASK, signs), gaussian(MASK, signs or 0)):
        known, beta = coherence(matrix, 6), squared_flatness(matrix)
        assert beta is not None
        for s in range(1, 5):
            deficit = max(one.upper for one in expansion_deficits(MASK, s + 1))
            assert float(known.at(s)) <= float(beta * deficit * (s + 1)) + 1e-12


def test_what_is_certified_holds() -> None:
    """T10, T11 and T12 on thousands of codes of a dictionary that certifies k = 3."""
    matrix, k = flat(polynomial_mask(11, 7, 2, 121), signs=3), 3
    known = coherence(matrix, 2 * k)
    k = known.omp_level
    assert k >= 3
    unit, rng = dense_unit(matrix), np.random.default_rng(0)
    support = np.argsort(rng.random((400, 121)))[:, :k]
    x = rng.choice([-1, 1], (400, k)) * rng.uniform(1, 5, (400, k))
    noise = rng.standard_normal((400, 77))
    # The worst direction: along a wrong column.
    wrong = np.argsort(rng.random((200, 121)))[:, 0]
    noise[:200] = unit[:, wrong].T
    allowed = np.abs(x).min(axis=1) / known.coefficient_to_noise(k)
    noise *= (0.999 * allowed / np.linalg.norm(noise, axis=1))[:, None]
    planted = np.zeros((400, 121))
    np.put_along_axis(planted, support, x, axis=1)
    clean = planted @ unit.T
    for e in (0 * noise, noise):
        code = omp(torch.from_numpy(clean + e), matrix.with_values(matrix.values.double()), k)
        assert (np.sort(code.indices.numpy(), axis=1) == np.sort(support, axis=1)).all()
    # Any two codes of k features are as far apart as T11 says.
    other = np.zeros((400, 121))
    np.put_along_axis(other, np.argsort(rng.random((400, 121)))[:, :k], rng.standard_normal((400, k)), axis=1)
    difference = planted - other
    apart = difference @ unit.T
    assert (np.linalg.norm(difference, axis=1) <= known.stability(k) * np.linalg.norm(apart, axis=1) + 1e-9).all()


def test_the_paper_s_size() -> None:
    """A random mask certifies k = 1 at m=512, n=4096, d=7, whatever its values; μ varies with the draw."""
    mask = random_mask(512, 4096, 7)
    for matrix, mu in ((flat(mask), Fraction(4, 7)), (flat(mask, signs=0), Fraction(4, 7)), (gaussian(mask), 0.895)):
        known = coherence(matrix, 4)
        assert float(known.mu) == pytest.approx(float(mu), abs=1e-3)
        assert (known.omp_level, known.unique_level) == (1, 1)


def test_bounded_overlap_at_the_paper_s_size() -> None:
    """q = 73: 511 rows of 512."""
    known = coherence(flat(polynomial_mask(73, 7, 2, 4096)), 9)
    assert known.mu == Fraction(1, 7)
    assert (known.omp_level, known.unique_level) == (3, 3)
