"""Conditions on given supports: by brute force, what they promise, and what predicts recovery."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from support.theory import dense_unit, flat, gaussian, polynomial_mask, random_mask

from expander_sae.dictionary import DenseMatrix, ExpanderMatrix
from expander_sae.ops import SparseCode
from expander_sae.pursuit import omp
from expander_sae.theory import (
    NOISE_LEVELS,
    auc,
    coverage,
    erc,
    measure,
    rank_correlation,
    recover,
    sigma_min,
    singular_values,
    survey,
)

MASK = random_mask(60, 90, 5)


def supports(count: int, k: int, n: int = 90, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.argsort(np.random.default_rng(seed).random((count, n)))[:, :k].copy())


def true_erc(unit: np.ndarray, support: list[int]) -> float:
    projected = np.linalg.pinv(unit[:, support]) @ np.delete(unit, support, axis=1)
    return float(np.abs(projected).sum(axis=0).max())


@pytest.mark.parametrize("kind", ["flat", "gaussian", "dense"])
def test_against_the_definitions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = flat(MASK, 1) if kind == "flat" else gaussian(MASK)
    unit, chosen = dense_unit(matrix), supports(12, 6)
    given = DenseMatrix(matrix.to_dense().T.contiguous()) if kind == "dense" else matrix
    used = torch.rand(12, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    used[:, 2] = True
    for slots in (None, used):
        on = [
            row[keep].tolist()
            for row, keep in zip(chosen, torch.ones_like(used) if slots is None else slots, strict=True)
        ]
        whole = erc(given, chosen, slots)
        np.testing.assert_allclose(whole, [true_erc(unit, support) for support in on], rtol=1e-6)
        values = [np.linalg.svd(unit[:, support], compute_uv=False) for support in on]
        least, largest = singular_values(given, chosen, slots)
        np.testing.assert_allclose(sigma_min(given, chosen, slots), least)
        # A slot that is not used adds a singular value of 1, which lies between the others.
        np.testing.assert_allclose(least, [one[-1] for one in values], rtol=1e-6)
        np.testing.assert_allclose(largest, [one[0] for one in values], rtol=1e-6)
        with monkeypatch.context() as patch:  # chunks of one
            patch.setattr("expander_sae.theory.on_codes._CELLS", 1)
            torch.testing.assert_close(erc(given, chosen, slots), whole)
    if kind == "dense":
        with pytest.raises(ValueError, match="this dictionary is dense"):
            coverage(given, chosen)
        return
    covered, collisions = coverage(given, chosen, used)
    on = [row[keep].tolist() for row, keep in zip(chosen, used, strict=True)]
    rows = MASK.rows.numpy()
    assert covered.tolist() == [len(np.unique(rows[support])) for support in on]
    assert (covered + collisions).tolist() == [5 * len(support) for support in on]


def test_dependent_and_empty_supports() -> None:
    rows = MASK.rows.clone()
    values = gaussian(MASK).values.clone()
    rows[1], values[1] = rows[0], -3 * values[0]
    matrix = ExpanderMatrix(rows, values, 60)
    chosen = torch.tensor([[0, 1, 2], [0, 2, 3]])
    assert sigma_min(matrix, chosen)[0] == 0
    assert math.isinf(erc(matrix, chosen)[0])
    assert erc(matrix, chosen)[1] >= 1 - 1e-9  # the double of column 0 stands outside
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert erc(matrix, chosen, nothing).tolist() == [0, 0]
    with pytest.raises(ValueError, match="shape"):
        erc(matrix, chosen[0])


def test_exact_recovery_holds_where_the_coefficient_is_below_one() -> None:
    matrix = gaussian(MASK)
    chosen = supports(3000, 3)
    safe = erc(matrix, chosen) < 1
    assert 0.05 < safe.double().mean() < 0.95
    values = torch.randn(3000, 3, generator=torch.Generator().manual_seed(2)).exp()
    found = recover(matrix, SparseCode(chosen.int(), values), torch.zeros(3000))
    assert bool(found.exact[safe].all())
    assert not bool(found.exact.all())
    torch.testing.assert_close(found.exact, found.share == 1)


def test_t15_noise_below_what_a_support_allows() -> None:
    """Noise in random directions, along wrong columns, and against the smallest coefficient."""
    mask = polynomial_mask(11, 7, 2, 121)
    matrix = gaussian(mask).unit(torch.float64)[0]
    chosen = supports(4000, 3, 121)
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(4000, 3, generator=generator, dtype=torch.float64).exp()
    code = SparseCode(chosen.int(), values)
    figures = measure(matrix, code, torch.ones(4000))
    unit = dense_unit(matrix)
    for support, needed in zip(chosen[:20].tolist(), figures.needed[:20].tolist(), strict=True):
        least, coefficient = np.linalg.svd(unit[:, support], compute_uv=False)[-1], true_erc(unit, support)
        assert needed == pytest.approx(2 / (least**2 * (1 - coefficient)) if coefficient < 1 else math.inf)
    safe = figures.needed < math.inf
    assert safe.sum() > 1000
    allowed = 0.999 * values.amin(dim=1) / figures.needed
    wrong = matrix.columns(supports(4000, 1, 121, seed=9)[:, 0])
    weakest = matrix.columns(chosen.gather(1, values.argmin(dim=1, keepdim=True))[:, 0])
    random = torch.randn(4000, 77, generator=generator, dtype=torch.float64)
    for direction in (random, wrong, -weakest):
        noise = direction / direction.norm(dim=1, keepdim=True) * allowed.unsqueeze(1)
        found = omp((matrix.decode(code) + noise)[safe], matrix, 3).indices
        torch.testing.assert_close(found.sort(dim=1).values, code.indices[safe].sort(dim=1).values)


def test_measures_are_in_units_of_unit_columns() -> None:
    matrix = gaussian(MASK)
    norms = torch.logspace(-2, 2, 90)
    scaled = matrix.with_values(matrix.unit(torch.float32)[0].values * norms.unsqueeze(1))
    chosen = supports(20, 4).int()
    values = torch.randn(20, 4, generator=torch.Generator().manual_seed(4))
    one = measure(matrix.unit(torch.float32)[0], SparseCode(chosen, values), torch.full((20,), 2.0))
    other = measure(scaled, SparseCode(chosen, values / norms[chosen.long()]), torch.full((20,), 2.0))
    for name in vars(one):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-4)
    np.testing.assert_allclose(one.coefficient_to_noise, values.abs().amin(dim=1) / 2, rtol=1e-6)


def test_auc_and_ranks() -> None:
    rng = np.random.default_rng(0)
    score, positive = torch.from_numpy(rng.integers(0, 6, 60)), torch.from_numpy(rng.random(60) < 0.4)
    pairs = list(product(score[positive].tolist(), score[~positive].tolist()))
    expected = np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])
    assert auc(score, positive) == pytest.approx(expected)
    assert auc(score, torch.ones(60, dtype=torch.bool)) is None
    infinite = torch.tensor([1.0, math.inf, 2.0, math.inf])
    assert auc(infinite, torch.tensor([False, True, False, True])) == 1
    assert rank_correlation(torch.arange(5), torch.arange(5) ** 3) == pytest.approx(1)
    assert rank_correlation(torch.arange(5), -torch.arange(5)) == pytest.approx(-1)
    assert rank_correlation(torch.arange(5), torch.zeros(5)) is None


def test_a_survey_tells_what_is_certain_and_what_predicts() -> None:
    """Supports of very different difficulty: the exact recovery coefficient must tell which come back."""
    matrix = gaussian(MASK)
    chosen = supports(400, 8)
    values = torch.randn(400, 8, generator=torch.Generator().manual_seed(5))
    values[::2, 3:] = 0  # every other code has three features
    whole = survey(matrix, SparseCode(chosen.int(), values), torch.full((400,), 0.1), source="toy", encoder="none")
    assert whole.tokens == 400
    assert whole.quantiles["active features"][::4] == (3, 8)
    assert [(one.size, one.noise) for one in whole.planted] == list(product((1, 2, 4, 8), NOISE_LEVELS))
    for one in whole.planted:
        assert 0 <= one.guaranteed <= one.exact <= one.share <= 1  # a guarantee is never broken
        assert one.guaranteed <= one.erc_below_one
    clean = whole.planted[-len(NOISE_LEVELS)]
    area = clean.auc["ERC"]
    assert area is not None
    assert area > 0.8
    with pytest.raises(ValueError, match="nothing to survey"):
        survey(matrix, SparseCode(chosen.int(), 0 * values), torch.ones(400))
