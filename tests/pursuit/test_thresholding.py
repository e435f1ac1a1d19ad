"""IHT, NIHT, HTP, CoSaMP, subspace pursuit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.pursuit import N, gaussian, planted

from expander_sae.dictionary import DenseMatrix, Matrix
from expander_sae.pursuit import PursuitCode, cosamp, htp, iht, niht, omp, refit, subspace_pursuit

SOLVERS = [iht, niht, htp, cosamp, subspace_pursuit]
FAST = [niht, htp, cosamp, subspace_pursuit]


@pytest.mark.parametrize("solver", FAST)
def test_recovers_planted_codes(make_matrix, solver: Callable[..., PursuitCode]) -> None:
    matrix = make_matrix(256, 512, 8)
    h, x = planted(matrix, 10, 6)
    code = solver(h, matrix, 6)
    torch.testing.assert_close(code.to_dense(512), x, atol=1e-8, rtol=0)
    assert not code.stopped_early.any()


def test_iht_recovers_on_nearly_orthogonal_columns() -> None:
    square = torch.linalg.qr(gaussian(64, 64, seed=3)).Q
    matrix = DenseMatrix(square)
    h, x = planted(matrix, 5, 8)
    code = iht(h, matrix, 8, refit=False)
    torch.testing.assert_close(code.to_dense(64), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("k", [1, 10, 25])
def test_codes_are_sparse_refitted_and_their_residual_is_reported(matrix: Matrix, solver, k: int) -> None:
    h = gaussian(8)
    code = solver(h, matrix, k)
    torch.testing.assert_close((h - matrix.decode(code)).norm(dim=1), code.residual_norms)
    assert all(len(set(row.tolist())) == k for row in code.indices)
    torch.testing.assert_close(code.values, refit(h, matrix, code.indices).values, atol=1e-9, rtol=1e-9)
    assert (code.iterations >= 1).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_steps_never_hurt(matrix: Matrix, solver) -> None:
    h = gaussian(8)
    options = {"refit": False} if solver in (iht, niht) else {}
    before = solver(h, matrix, 10, steps=1, **options).residual_norms
    for steps in (2, 5, 20):
        after = solver(h, matrix, 10, steps=steps, **options).residual_norms
        assert (after <= before + 1e-12).all()
        before = after


@pytest.mark.parametrize("solver", FAST)
def test_none_is_far_from_omp(matrix: Matrix, solver) -> None:
    h = gaussian(40)
    assert solver(h, matrix, 10).residual_norms.mean() < 1.15 * omp(h, matrix, 10).residual_norms.mean()


@pytest.mark.parametrize("solver", FAST)
def test_tolerance_ends_a_sample(make_matrix, solver) -> None:
    matrix = make_matrix(256, 512, 8)
    h, _ = planted(matrix, 6, 6)
    assert (solver(h, matrix, 6, tol=0.9).iterations <= solver(h, matrix, 6).iterations).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_dictionaries_and_samples(make_matrix, solver, dtype: torch.dtype) -> None:
    matrix = make_matrix(12, 40, 3, dtype=dtype).subset(torch.arange(40).repeat_interleave(2))
    h = gaussian(9, 12, dtype=dtype)
    h[3] = 0
    for k in (1, 11, 80):
        code = solver(h, matrix, k)
        assert code.values.isfinite().all()
        assert (code.values[3] == 0).all()
        assert (code.residual_norms <= h.norm(dim=1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_bad_arguments_are_named(matrix: Matrix, solver) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1"):
        solver(gaussian(2), matrix, 3, steps=0)
    with pytest.raises(ValueError, match="tol is a fraction"):
        solver(gaussian(2), matrix, 3, tol=float("nan"))
    with pytest.raises(ValueError, match=f"d_sae = {N}"):
        solver(gaussian(2), matrix, N + 1)
