"""Matching pursuit and gradient pursuit."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.pursuit import N, dense, expander, gaussian, planted
from torch import Tensor

from expander_sae.dictionary import Matrix
from expander_sae.pursuit import gradient_pursuit, matching_pursuit, omp, refit


def plain_matching_pursuit(h: Tensor, matrix: Matrix, steps: int, reselect: bool) -> Tensor:
    """One sample, step by step on dense columns."""
    columns = matrix.to_dense()
    x = torch.zeros(columns.shape[1], dtype=h.dtype)
    left, out = h.clone(), torch.zeros(columns.shape[1], dtype=torch.bool)
    for _ in range(steps):
        correlations = left @ columns
        j = int(correlations.abs().masked_fill(out, -1).argmax())
        x[j] += correlations[j]
        left = left - correlations[j] * columns[:, j]
        out[j] = not reselect
    return x


@pytest.mark.parametrize("reselect", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_plain_recursion(make_matrix, reselect: bool, dtype: torch.dtype) -> None:
    matrix, h = make_matrix(dtype=dtype), gaussian(6, dtype=dtype)
    code = matching_pursuit(h, matrix, 15, reselect=reselect, refit=False)
    expected = torch.stack([plain_matching_pursuit(sample, matrix, 15, reselect) for sample in h])
    torch.testing.assert_close(code.to_dense(N), expected, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
    assert (code.iterations == 15).all()
    assert torch.equal(code.stopped_early, (code.values != 0).sum(dim=1) < 15)


def test_large_batches_update_correlations_through_the_gram_matrix() -> None:
    matrix, h = dense(expander()), gaussian(40)
    code = matching_pursuit(h, matrix, 12, refit=False)  # 40 · 12 steps are more than 160 columns
    few = torch.cat([matching_pursuit(part, matrix, 12, refit=False).to_dense(N) for part in h.split(10)])
    torch.testing.assert_close(code.to_dense(N), few)


def test_refit_is_least_squares_on_the_same_support(matrix: Matrix) -> None:
    h = gaussian(6)
    raw, code = matching_pursuit(h, matrix, 15, refit=False), matching_pursuit(h, matrix, 15)
    assert torch.equal(raw.indices, code.indices)
    torch.testing.assert_close(code.values, refit(h, matrix, raw.indices).values)
    assert (code.residual_norms <= raw.residual_norms).all()


def test_residual_falls_by_the_energy_of_each_step(matrix: Matrix) -> None:
    h = gaussian(6)
    code = matching_pursuit(h, matrix, 12, refit=False)
    energy = h.square().sum(dim=1) - code.values.square().sum(dim=1)
    torch.testing.assert_close(code.residual_norms.square(), energy)
    norms = [matching_pursuit(h, matrix, k, refit=False).residual_norms for k in range(1, 12)]
    assert all((after < before).all() for before, after in itertools.pairwise(norms))


def test_refitted_is_close_to_omp_on_gaussian_samples() -> None:
    matrix = expander(256, 2048, 7, dtype=torch.float32)
    h = gaussian(32, 256, dtype=torch.float32)
    assert matching_pursuit(h, matrix, 32).residual_norms.mean() < 1.02 * omp(h, matrix, 32).residual_norms.mean()


def test_reselection_converges_on_planted_codes(make_matrix) -> None:
    matrix = make_matrix(256, 512, 8)
    h, x = planted(matrix, 6, 4)
    code = matching_pursuit(h, matrix, 60, reselect=True, tol=1e-6)
    # Features beyond the planted ones may be touched on the way, by ever smaller amounts.
    torch.testing.assert_close(code.to_dense(512), x, atol=1e-3, rtol=0)
    assert ((code.values != 0).sum(dim=1) < code.iterations).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tolerance_stops_before_the_refit(make_matrix, dtype: torch.dtype) -> None:
    matrix, h = make_matrix(dtype=dtype), gaussian(10, dtype=dtype)
    raw = matching_pursuit(h, matrix, 60, tol=0.5, refit=False)
    assert (raw.residual_norms <= 0.5 * h.norm(dim=1)).all()
    assert (raw.iterations < 60).all()
    assert torch.equal(raw.iterations, matching_pursuit(h, matrix, 60, tol=0.5).iterations)


@pytest.mark.parametrize("options", [{"nonnegative": True}, {"nonnegative": True, "refit": False}])
def test_nonnegative_codes(matrix: Matrix, options: dict) -> None:
    h = gaussian(10)
    code = matching_pursuit(h, matrix, 12, **options)
    assert (code.values >= 0).all()
    assert (code.residual_norms < h.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"refit": False}, {"reselect": True}, {"signed": True}])
def test_degenerate_dictionaries_and_samples(make_matrix, dtype: torch.dtype, options: dict) -> None:
    matrix = make_matrix(12, 40, 3, dtype=dtype).subset(torch.arange(40).repeat_interleave(2))
    h = gaussian(9, 12, dtype=dtype)
    h[3] = 0
    code = matching_pursuit(h, matrix, 30, **options)
    assert code.values.isfinite().all()
    assert (code.values[3] == 0).all()
    assert code.iterations[3] == 0
    assert (code.residual_norms <= h.norm(dim=1)).all()
    for row, values in zip(code.indices, code.values, strict=True):
        used = row[values != 0].tolist()
        assert len(used) == len(set(used))


def test_gradient_pursuit_first_step_is_omp_and_many_steps_are_least_squares(matrix: Matrix) -> None:
    h = gaussian(8)
    one, expected = gradient_pursuit(h, matrix, 1), omp(h, matrix, 1)
    assert torch.equal(one.indices, expected.indices)
    torch.testing.assert_close(one.values, expected.values)
    many, expected = gradient_pursuit(h, matrix, 10, steps=60), omp(h, matrix, 10)
    assert torch.equal(many.indices, expected.indices)
    torch.testing.assert_close(many.values, expected.values, atol=1e-6, rtol=0)


def test_gradient_pursuit_lies_between_matching_pursuit_and_omp(matrix: Matrix) -> None:
    h = gaussian(64)
    means = [
        solver.residual_norms.mean()
        for solver in (
            omp(h, matrix, 20),
            gradient_pursuit(h, matrix, 20, steps=3),
            gradient_pursuit(h, matrix, 20),
            matching_pursuit(h, matrix, 20, refit=False),
        )
    ]
    assert means == sorted(means)


def test_gradient_pursuit_nonnegative_and_degenerate(make_matrix) -> None:
    matrix = make_matrix(12, 40, 3).subset(torch.arange(40).repeat(2))
    h = gaussian(9, 12)
    h[2] = 0
    for nonnegative in (False, True):
        code = gradient_pursuit(h, matrix, 30, nonnegative=nonnegative)
        assert code.values.isfinite().all()
        assert (code.residual_norms <= h.norm(dim=1)).all()
        assert not nonnegative or (code.values >= 0).all()
    with pytest.raises(ValueError, match="steps must be at least 1"):
        gradient_pursuit(h, matrix, 3, steps=0)
