"""ISTA and FISTA, against scikit-learn's Lasso."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from support.pursuit import M, N, gaussian, planted

from expander_sae.dictionary import Matrix
from expander_sae.pursuit import fista, ista, refit


@pytest.mark.parametrize("nonnegative", [False, True])
def test_converges_to_the_lasso(matrix: Matrix, nonnegative: bool) -> None:
    h, penalty = gaussian(4), 0.3
    columns = matrix.to_dense().numpy()
    fast = fista(h, matrix, N, penalty=penalty, steps=500, nonnegative=nonnegative, refit=False).to_dense(N)
    slow = ista(h, matrix, N, penalty=penalty, steps=2000, nonnegative=nonnegative, refit=False).to_dense(N)
    for b in range(4):
        score = h[b].numpy() @ columns
        weight = penalty * (score.max() if nonnegative else np.abs(score).max())
        lasso = Lasso(alpha=weight / M, fit_intercept=False, positive=nonnegative, tol=1e-12, max_iter=100000)
        expected = lasso.fit(columns, h[b].numpy()).coef_
        np.testing.assert_allclose(fast[b].numpy(), expected, atol=1e-6)
        np.testing.assert_allclose(slow[b].numpy(), expected, atol=1e-3)


def test_refit_is_least_squares_on_the_largest(matrix: Matrix) -> None:
    h = gaussian(6)
    raw, code = fista(h, matrix, 8, refit=False), fista(h, matrix, 8)
    assert torch.equal(raw.indices, code.indices)
    torch.testing.assert_close(code.values, refit(h, matrix, raw.indices).values)
    assert (raw.values.abs().diff(dim=1) <= 0).all()


def test_recovers_planted_codes(make_matrix) -> None:
    matrix = make_matrix(256, 512, 8)
    h, x = planted(matrix, 8, 6)
    torch.testing.assert_close(fista(h, matrix, 6, steps=300).to_dense(512), x, atol=1e-8, rtol=0)


@pytest.mark.parametrize("solver", [ista, fista])
def test_degenerate_dictionaries_and_samples(make_matrix, solver) -> None:
    matrix = make_matrix(12, 40, 3).subset(torch.arange(40).repeat(2))
    h = gaussian(9, 12)
    h[3] = 0
    for nonnegative in (False, True):
        code = solver(h, matrix, 20, nonnegative=nonnegative)
        assert code.values.isfinite().all()
        assert (code.values[3] == 0).all()
        assert code.iterations[3] == 0
        assert (code.residual_norms <= h.norm(dim=1)).all()
        assert not nonnegative or (code.values >= 0).all()


def test_bad_arguments_are_named(matrix: Matrix) -> None:
    with pytest.raises(ValueError, match="penalty is a fraction"):
        fista(gaussian(2), matrix, 3, penalty=1.0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        ista(gaussian(2), matrix, 3, steps=0)
