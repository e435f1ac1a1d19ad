"""Refits on given supports and non-negative OMP, against SciPy and the optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from support.pursuit import N, dense, expander, gaussian, planted

from expander_sae.dictionary import DenseMatrix, Matrix
from expander_sae.pursuit import matching_pursuit, omp, refit
from expander_sae.pursuit.problem import whole_gram


def supports(batch: int, k: int) -> torch.Tensor:
    return torch.rand(batch, N, generator=torch.Generator().manual_seed(5)).argsort(dim=1)[:, :k].to(torch.int32)


def nnls_on(matrix: Matrix, h: torch.Tensor, indices: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    columns = matrix.columns(indices).mT.numpy()
    solutions = [nnls(w, target) for w, target in zip(columns, h.numpy(), strict=True)]
    return np.stack([x for x, _ in solutions]), np.array([norm for _, norm in solutions])


def test_refit_is_least_squares(matrix: Matrix) -> None:
    h, indices = gaussian(7), supports(7, 12)
    code = refit(h, matrix, indices)
    expected = torch.linalg.lstsq(matrix.columns(indices).mT, h.unsqueeze(2)).solution.squeeze(2)
    assert torch.equal(code.indices, indices)
    torch.testing.assert_close(code.values, expected)
    torch.testing.assert_close(code.residual_norms, (h - matrix.decode(code)).norm(dim=1))
    assert not code.stopped_early.any()


def test_refit_gives_repeated_and_dependent_columns_nothing(matrix: Matrix) -> None:
    h = gaussian(5)
    indices = torch.cat([supports(5, 6), supports(5, 6)], dim=1)
    code = refit(h, matrix, indices)
    expected = refit(h, matrix, supports(5, 6))
    torch.testing.assert_close(code.values[:, :6], expected.values)
    assert (code.values[:, 6:] == 0).all()
    assert code.stopped_early.all()


def test_refit_on_more_columns_than_rows(make_matrix) -> None:
    matrix = make_matrix(10, 40, 3)
    h = gaussian(4, 10)
    code = refit(h, matrix, torch.arange(30).expand(4, 30))
    assert code.values.isfinite().all()
    assert (code.residual_norms < 1e-9).all()


def test_refit_takes_batches_and_b_dec(matrix: Matrix) -> None:
    h, indices, b_dec = gaussian(6), supports(6, 5), gaussian(1)[0]
    expected = refit(h - b_dec, matrix, indices)
    code = refit(h.reshape(2, 3, -1), matrix, indices.reshape(2, 3, 5), b_dec=b_dec)
    assert torch.equal(code.values.reshape(6, 5), expected.values)


def test_refit_works_in_chunks(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    h, indices = gaussian(6), supports(6, 5)
    expected = refit(h, matrix, indices)
    monkeypatch.setattr("expander_sae.pursuit.problem.WORKING_BYTES", 1)
    torch.testing.assert_close(refit(h, matrix, indices).values, expected.values)


def test_refit_names_bad_supports(matrix: Matrix) -> None:
    h = gaussian(3)
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 160\), got \[0, 160\]"):
        refit(h, matrix, torch.tensor([0, N]).expand(3, 2))
    with pytest.raises(ValueError, match="do not fit"):
        refit(h, matrix, torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match="integers"):
        refit(h, matrix, torch.zeros(3, 4))


def test_nonnegative_refit_equals_scipy(matrix: Matrix) -> None:
    h, indices = gaussian(20), supports(20, 15)
    code = refit(h, matrix, indices, nonnegative=True)
    x, norms = nnls_on(matrix, h, indices)
    np.testing.assert_allclose(code.residual_norms.numpy(), norms, rtol=1e-9)
    expected = np.zeros((20, N))
    np.put_along_axis(expected, indices.numpy().astype(np.int64), x, axis=1)
    np.testing.assert_allclose(code.to_dense(N).numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("block", [1, 4])
def test_nonnegative_omp_is_nnls_on_its_support(matrix: Matrix, block: int) -> None:
    h = gaussian(20)
    code = omp(h, matrix, 16, nonnegative=True, block=block)
    assert (code.values >= 0).all()
    assert ((code.values > 0).sum(dim=1) == 16).all()
    _, norms = nnls_on(matrix, h, code.indices)
    np.testing.assert_allclose(code.residual_norms.numpy(), norms, rtol=1e-9)


def test_nonnegative_omp_recovers_planted_codes(make_matrix) -> None:
    matrix = make_matrix(256, 512, 8)
    _, x = planted(matrix, 10, 5)
    x = x.abs()
    code = omp(x @ matrix.to_dense().T, matrix, 5, nonnegative=True)
    torch.testing.assert_close(code.to_dense(512), x, atol=1e-10, rtol=0)


def test_nonnegative_omp_stops_where_all_correlations_are_negative() -> None:
    matrix = DenseMatrix(torch.eye(4, dtype=torch.float64))
    code = omp(torch.tensor([[-1.0, -2, -3, -4], [-1, 2, -3, -4]], dtype=torch.float64), matrix, 3, nonnegative=True)
    assert code.to_dense(4).tolist() == [[0, 0, 0, 0], [0, 2, 0, 0]]
    assert code.iterations.tolist() == [0, 1]
    assert code.stopped_early.all()
    assert matching_pursuit(-torch.ones(1, 4, dtype=torch.float64), matrix, 2, nonnegative=True).values.sum() == 0


def test_nonnegative_omp_drops_a_feature_that_turns_negative() -> None:
    # Greedy takes the diagonal first; once both axes are in, its coefficient would be negative.
    columns = torch.tensor([[1.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    matrix = DenseMatrix(columns / columns.norm(dim=1, keepdim=True))
    h = torch.tensor([[1.0, 1.0, -0.2]], dtype=torch.float64)
    assert omp(h, matrix, 1, nonnegative=True).indices.tolist() == [[0]]
    code = omp(h, matrix, 3, nonnegative=True)
    x, norms = nnls_on(matrix, h, torch.tensor([[0, 1, 2]]))
    assert (x > 0).sum() < 3  # the example does what it says
    np.testing.assert_allclose(code.to_dense(3).numpy(), x, atol=1e-9)
    np.testing.assert_allclose(code.residual_norms.numpy(), norms, atol=1e-9)


@pytest.mark.parametrize("block", [1, 3])
def test_nonnegative_omp_on_large_batches_goes_through_the_gram_matrix(block: int) -> None:
    matrix, h = dense(expander(dtype=torch.float32)), gaussian(96, dtype=torch.float32)
    assert whole_gram(matrix, len(h) * 4) is not None
    assert whole_gram(matrix, 8 * 12) is None
    code = omp(h, matrix, 12, nonnegative=True, block=block)
    parts = [omp(part, matrix, 12, nonnegative=True, block=block) for part in h.split(8)]
    assert torch.equal(code.indices, torch.cat([part.indices for part in parts]))
    torch.testing.assert_close(code.values, torch.cat([part.values for part in parts]), atol=1e-5, rtol=1e-4)


def test_nonnegative_omp_tries_a_dependent_feature_once() -> None:
    # With 0 and 2 in use, 1 correlates well above rounding, but depends on 0.
    matrix = DenseMatrix(torch.tensor([[1.0, 0, 0], [1.0, 1e-3, 0], [0, -0.6, 0.8], [0, -1.0, 0]]))
    code = omp(torch.tensor([[2.0, -0.01, 1.0]]), matrix, 4, nonnegative=True)
    assert code.indices[0, :2].tolist() == [0, 2]
    assert code.iterations.tolist() == [3]
    assert code.stopped_early.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nonnegative_omp_bears_duplicates_and_k_beyond_the_rank(make_matrix, dtype: torch.dtype) -> None:
    matrix = make_matrix(12, 40, 3, dtype=dtype).subset(torch.arange(40).repeat_interleave(2))
    h = gaussian(10, 12, dtype=dtype)
    code = omp(h, matrix, 40, nonnegative=True)
    assert code.values.isfinite().all()
    assert (code.values >= 0).all()
    _, norms = nnls_on(matrix, h, torch.arange(80).expand(10, 80))
    np.testing.assert_allclose(code.residual_norms.numpy(), norms, atol=1e-4 if dtype == torch.float32 else 1e-9)
