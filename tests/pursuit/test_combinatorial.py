"""Combinatorial decoders on binary and weighted expanders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.pursuit import dense, expander, gaussian, planted

from expander_sae.dictionary import ExpanderMatrix
from expander_sae.pursuit import (
    PursuitCode,
    expander_recovery,
    lddsr,
    parallel_l0,
    robust_l0,
    serial_l0,
    smp,
    ssmp,
)
from expander_sae.pursuit.combinatorial import _disjoint_classes

EXACT = [parallel_l0, serial_l0, expander_recovery, lddsr, robust_l0, ssmp]
ALL = [*EXACT, smp]


@pytest.fixture(params=["binary", "weighted"])
def matrix(request: pytest.FixtureRequest) -> ExpanderMatrix:
    weighted = expander(192, 384, 7)
    return weighted if request.param == "weighted" else replace(weighted, values=torch.ones_like(weighted.values))


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recovers_planted_codes(matrix: ExpanderMatrix, solver: Callable[..., PursuitCode], dtype: torch.dtype) -> None:
    matrix = replace(matrix, values=matrix.values.to(dtype))
    h, x = planted(matrix, 10, 10)
    code = solver(h, matrix, 10)
    torch.testing.assert_close(code.to_dense(384), x, atol=1e-4 if dtype == torch.float32 else 1e-8, rtol=0)


def test_smp_recovers_the_sparsest(matrix: ExpanderMatrix) -> None:
    h, x = planted(matrix, 20, 3)
    error = (smp(h, matrix, 3).to_dense(384) - x).norm(dim=1)
    assert (error < 1e-6).float().mean() >= 0.9


def test_parallel_l0_takes_few_passes(matrix: ExpanderMatrix) -> None:
    h, _ = planted(matrix, 10, 10)
    assert (parallel_l0(h, matrix, 10).iterations <= 10).all()


def test_robust_l0_bears_noise_where_parallel_l0_does_not(matrix: ExpanderMatrix) -> None:
    h, x = planted(matrix, 12, 10)
    noise = gaussian(12, 192, seed=7)
    h = h + 0.02 * noise / noise.norm(dim=1, keepdim=True) * h.norm(dim=1, keepdim=True)

    def solved(code: PursuitCode) -> float:
        return float(((code.to_dense(384) - x).norm(dim=1) < 0.1 * x.norm(dim=1)).double().mean())

    assert solved(robust_l0(h, matrix, 10, noise=0.02)) >= 0.9
    assert solved(ssmp(h, matrix, 10, rounds=1)) >= 0.9
    assert solved(parallel_l0(h, matrix, 10)) <= 0.1


def test_classes_share_no_row_and_hold_every_column_once() -> None:
    matrix = expander()
    classes = _disjoint_classes(matrix)
    assert sorted(torch.cat(classes).tolist()) == list(range(matrix.d_sae))
    for columns in classes:
        rows = matrix.rows[columns].flatten()
        assert rows.unique().numel() == rows.numel()


@pytest.mark.parametrize("solver", ALL)
def test_activations_and_degenerate_inputs_give_finite_codes(solver) -> None:
    matrix = expander(24, 60, 4).subset(torch.arange(60).repeat_interleave(2))
    matrix.values[5] = 0
    matrix.values[9, 0] = 0
    h = gaussian(8, 24)
    h[3] = 0
    for k in (1, 10, 60):
        code = solver(h, matrix, k)
        assert code.values.isfinite().all()
        assert (code.values[3] == 0).all()
        assert code.stopped_early[3]
        assert (code.residual_norms <= h.norm(dim=1) * 3).all()


@pytest.mark.parametrize("solver", ALL)
def test_dense_dictionaries_are_refused(solver) -> None:
    with pytest.raises(ValueError, match="needs an expander dictionary"):
        solver(gaussian(2), dense(expander()), 3)


def test_bad_arguments_are_named() -> None:
    matrix, h = expander(), gaussian(2)
    with pytest.raises(ValueError, match="alpha must be between 1 and the degree 5, got 6"):
        parallel_l0(h, matrix, 3, alpha=6)
    with pytest.raises(ValueError, match="epsilon"):
        expander_recovery(h, matrix, 3, epsilon=0.5)
    with pytest.raises(ValueError, match="noise is a fraction"):
        robust_l0(h, matrix, 3, noise=0)
    with pytest.raises(ValueError, match="steps"):
        smp(h, matrix, 3, steps=0)
    with pytest.raises(ValueError, match="factor and rounds"):
        ssmp(h, matrix, 3, factor=0)
