"""OMP, block OMP and OLS: scikit-learn as oracle, defining properties, degenerate inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp
from support.pursuit import M, N, dense, expander, gaussian, planted
from torch import Tensor

from expander_sae.dictionary import DenseDictionary, DenseMatrix, ExpanderDictionary, ExpanderMatrix, Matrix
from expander_sae.mask import Mask
from expander_sae.pursuit import PursuitCode, ols, omp, selection
from expander_sae.pursuit.problem import whole_gram


def residual(h: Tensor, matrix: Matrix, code: PursuitCode) -> Tensor:
    return h - matrix.decode(code)


def least_squares(h: Tensor, matrix: Matrix, code: PursuitCode) -> Tensor:
    """Coefficients on each sample's support by a dense solver."""
    out = torch.zeros_like(code.values)
    for b in range(h.shape[0]):
        used = code.values[b] != 0
        columns = matrix.columns(code.indices[b, used]).T
        out[b, used] = torch.linalg.lstsq(columns, h[b, :, None], driver="gelsd").solution[:, 0]
    return out


def sklearn_codes(matrix: Matrix, h: Tensor, k: int) -> np.ndarray:
    return orthogonal_mp(matrix.to_dense().double().numpy(), h.double().numpy().T, n_nonzero_coefs=k).T


@pytest.mark.parametrize("k", [1, 7, 20])
def test_equals_scikit_learn(matrix: Matrix, k: int) -> None:
    h = gaussian(12)
    ours = omp(h, matrix, k).to_dense(N).numpy()
    np.testing.assert_allclose(ours, sklearn_codes(matrix, h, k), atol=1e-10)


def test_equals_scikit_learn_in_float32(make_matrix) -> None:
    matrix, h = make_matrix(dtype=torch.float32), gaussian(12, dtype=torch.float32)
    ours = omp(h, matrix, 12).to_dense(N).numpy()
    np.testing.assert_allclose(ours, sklearn_codes(matrix, h, 12), atol=2e-5)


def test_recovers_planted_codes(make_matrix) -> None:
    matrix = make_matrix(256, 512, 8)
    h, x = planted(matrix, 10, 5)
    code = omp(h, matrix, 5)
    torch.testing.assert_close(code.to_dense(512), x, atol=1e-10, rtol=0)
    assert (code.residual_norms < 1e-10).all()
    assert (code.iterations == 5).all()
    assert not code.stopped_early.any()


def test_stops_at_the_planted_size(make_matrix) -> None:
    matrix = make_matrix(256, 512, 8)
    h, _ = planted(matrix, 10, 5)
    code = omp(h, matrix, 20)
    assert (code.iterations == 5).all()
    assert code.stopped_early.all()
    assert (code.values[:, 5:] == 0).all()
    assert (code.indices[:, 5:] == 0).all()


@pytest.mark.parametrize("options", [{}, {"block": 4}, {"block": 16}, {"signed": True}])
def test_coefficients_are_least_squares_on_the_support(matrix: Matrix, options: dict) -> None:
    h = gaussian(8)
    code = omp(h, matrix, 16, **options)
    torch.testing.assert_close(code.values, least_squares(h, matrix, code), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(residual(h, matrix, code).norm(dim=1), code.residual_norms)


def test_residual_never_rises_with_k(matrix: Matrix) -> None:
    h = gaussian(8)
    norms = [omp(h, matrix, k).residual_norms for k in range(1, 20)]
    for before, after in itertools.pairwise(norms):
        assert (after <= before + 1e-12).all()


def test_each_pick_is_the_largest_correlation(matrix: Matrix) -> None:
    h = gaussian(6)
    code = omp(h, matrix, 8)
    for k in range(8):
        left = h if k == 0 else residual(h, matrix, omp(h, matrix, k))
        expected = matrix.correlate(left).abs().argmax(dim=1)
        assert torch.equal(code.indices[:, k].long(), expected)


def test_signed_selection_takes_the_largest_signed_correlation(matrix: Matrix) -> None:
    h = gaussian(6)
    code = omp(h, matrix, 1, signed=True)
    assert torch.equal(code.indices[:, 0].long(), matrix.correlate(h).argmax(dim=1))


def test_a_block_takes_the_largest_correlations(matrix: Matrix) -> None:
    h = gaussian(6)
    code = omp(h, matrix, 8, block=4)
    first = matrix.correlate(h).abs().topk(4).indices
    assert torch.equal(code.indices[:, :4].long(), first)
    second = matrix.correlate(residual(h, matrix, omp(h, matrix, 4, block=4))).abs().topk(4).indices
    assert torch.equal(code.indices[:, 4:].long(), second)
    assert (code.iterations == 2).all()


def test_a_last_block_takes_what_is_left(matrix: Matrix) -> None:
    code = omp(gaussian(6), matrix, 7, block=3)
    assert (code.iterations == 3).all()
    assert not code.stopped_early.any()
    assert all(len(set(row.tolist())) == 7 for row in code.indices)


def test_one_shot_is_selection_and_refit(matrix: Matrix) -> None:
    h = gaussian(6)
    code = omp(h, matrix, 10, block=10)
    assert torch.equal(code.indices.long(), matrix.correlate(h).abs().topk(10).indices)
    assert (code.iterations == 1).all()


@pytest.mark.parametrize("backend", ["reference", None])
def test_disjoint_rounds_share_no_row(backend: str | None) -> None:
    matrix = expander(dtype=torch.float32)
    h = gaussian(16, dtype=torch.float32)
    code = omp(h, matrix, 12, block=4, disjoint=True, backend=backend)
    for row in code.indices.long():
        for start in range(0, 12, 4):
            rows = matrix.rows[row[start : start + 4]].flatten()
            assert rows.unique().numel() == rows.numel()
    assert (code.residual_norms < omp(h, matrix, 12, block=12).residual_norms).float().mean() > 0.9


@pytest.mark.parametrize("backend", ["reference", None])
def test_disjoint_rounds_fill_up_with_the_best_of_the_others(backend: str | None) -> None:
    # Four columns on the same rows: no two are disjoint, and the round still takes three.
    rows = torch.arange(3, dtype=torch.int32).repeat(4, 1)
    values = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    matrix = ExpanderMatrix(rows, values, 3)
    code = omp(torch.tensor([[3.0, 2.0, 1.0]]), matrix, 3, block=3, disjoint=True, backend=backend)
    assert code.indices.tolist() == [[3, 0, 1]]
    assert code.iterations.tolist() == [1]


def test_tolerance_is_relative_and_met(matrix: Matrix) -> None:
    h = gaussian(10) * torch.logspace(-3, 3, 10, dtype=torch.float64)[:, None]
    code = omp(h, matrix, 40, tol=0.5)
    assert (code.residual_norms <= 0.5 * h.norm(dim=1)).all()
    shorter = [omp(h[b : b + 1], matrix, int(code.iterations[b]) - 1).residual_norms[0] for b in range(10)]
    assert (torch.stack(shorter) > 0.5 * h.norm(dim=1)).all()
    assert code.stopped_early.all()


def test_column_norms_change_nothing_but_the_coefficients(make_matrix) -> None:
    unit, h = make_matrix(), gaussian(6)
    scale = torch.logspace(-4, 4, N, dtype=torch.float64)
    scaled = DenseMatrix(unit.to_dense().T * scale[:, None])
    expected, code = omp(h, unit, 10), omp(h, scaled, 10)
    assert torch.equal(code.indices, expected.indices)
    torch.testing.assert_close(code.values * scale[code.indices.long()], expected.values)


def test_scale_of_the_samples_changes_nothing_but_the_coefficients(matrix: Matrix) -> None:
    h = gaussian(6)
    expected = omp(h, matrix, 10)
    for scale in (2.0**-900, 2.0**900):  # squares of these leave the range of the type
        code = omp(h * scale, matrix, 10)
        assert torch.equal(code.indices, expected.indices)
        assert torch.equal(code.values, expected.values * scale)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e37])
def test_extreme_samples_in_float32(make_matrix, scale: float) -> None:
    matrix = make_matrix(dtype=torch.float32)
    h = gaussian(6, dtype=torch.float32).clamp(-3, 3) * scale
    code = omp(h, matrix, 8)
    assert code.values.isfinite().all()
    assert code.residual_norms.isfinite().all()
    assert (code.values != 0).any(dim=1).all()


def test_b_dec_is_subtracted(matrix: Matrix) -> None:
    h, b_dec = gaussian(6), gaussian(1, seed=9)[0]
    expected = omp(h - b_dec, matrix, 5)
    code = omp(h, matrix, 5, b_dec=b_dec)
    assert torch.equal(code.indices, expected.indices)
    assert torch.equal(code.values, expected.values)


def test_batch_shape_and_dtypes(make_matrix) -> None:
    matrix = make_matrix(dtype=torch.float32)
    h = gaussian(6).reshape(2, 3, M)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        code = omp(h.to(dtype), matrix, 4)
        assert code.indices.shape == code.values.shape == (2, 3, 4)
        assert code.indices.dtype == torch.int32
        assert code.values.dtype == dtype
        assert code.residual_norms.shape == code.iterations.shape == code.stopped_early.shape == (2, 3)
    assert omp(h[0, 0].float(), matrix, 4).indices.shape == (4,)
    assert omp(h[:0].float(), matrix, 4).indices.shape == (0, 3, 4)


def test_takes_dictionary_modules_and_builds_no_graph() -> None:
    mask = Mask.build("left-regular", d_in=M, d_sae=N, degree=4)
    for dictionary in (ExpanderDictionary(mask), DenseDictionary.random(M, N)):
        h = gaussian(3, dtype=torch.float32).requires_grad_()
        code = omp(h, dictionary, 4)
        assert not code.values.requires_grad
        expected = omp(h, dictionary.matrix(), 4)
        assert torch.equal(code.indices, expected.indices)


def test_memory_cap_changes_nothing(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    h = gaussian(9)
    expected = omp(h, matrix, 6, backend="reference")
    monkeypatch.setattr("expander_sae.pursuit.problem.WORKING_BYTES", 1)
    code = omp(h, matrix, 6, backend="reference")
    assert torch.equal(code.indices, expected.indices)
    torch.testing.assert_close(code.values, expected.values)


@pytest.mark.parametrize("solve", [omp, partial(omp, block=3), partial(omp, signed=True), ols], ids=str)
def test_large_batches_go_through_the_gram_matrix(solve: Callable[..., PursuitCode]) -> None:
    twice = dense(expander(dtype=torch.float32)).subset(torch.arange(N).repeat_interleave(2))
    h = gaussian(96, dtype=torch.float32)
    h[5] = 0
    assert whole_gram(twice, len(h) * 7) is not None
    assert whole_gram(twice, 8 * 21) is None
    code = solve(h, twice, 21)  # the last rounds correlate anew
    parts = [solve(part, twice, 21) for part in h.split(8)]
    assert torch.equal(code.indices, torch.cat([part.indices for part in parts]))
    torch.testing.assert_close(code.values, torch.cat([part.values for part in parts]), atol=1e-5, rtol=1e-4)
    assert torch.equal(code.stopped_early, h.norm(dim=1) == 0)


def test_k_beyond_the_rank_through_the_gram_matrix() -> None:
    matrix, h = dense(expander(64, 40, 3, dtype=torch.float32)), gaussian(64, dtype=torch.float32)
    matrix = matrix.subset(torch.arange(40).repeat(2))
    code = omp(h, matrix, 60)
    assert code.stopped_early.all()
    assert (code.indices < 40).all()
    explained = (least_squares(h, matrix, code).unsqueeze(2) * matrix.columns(code.indices)).sum(dim=1)
    torch.testing.assert_close(residual(h, matrix, code), h - explained, atol=1e-4, rtol=0)


def certified_sparsity(matrix: Matrix) -> int:
    """The largest ``k`` with ``μ₁(k) + μ₁(k - 1) < 1``: OMP recovers every code (Tropp 2004; docs/theory.md T10)."""
    columns = matrix.to_dense()
    gram = (columns.T @ columns).abs().fill_diagonal_(0)
    cumulative = gram.sort(dim=1, descending=True).values.cumsum(dim=1).amax(dim=0)
    babel = torch.cat([cumulative.new_zeros(1), cumulative])
    return int((babel[1:] + babel[:-1] < 1).sum())


@pytest.mark.parametrize("backend", ["reference", None])
def test_recovers_every_code_in_the_certified_region(backend: str | None) -> None:
    flat = expander(1024, 96, 16, dtype=torch.float32)
    matrix = ExpanderMatrix(flat.rows, torch.full_like(flat.values, 0.25), 1024)
    k = certified_sparsity(matrix)
    assert k >= 3
    generator = torch.Generator().manual_seed(0)
    support = torch.rand(300, 96, generator=generator).argsort(dim=1)[:, :k]
    size = 10 ** (3 * torch.rand(300, k, generator=generator) - 1.5)  # three decades of coefficients
    x = torch.zeros(300, 96).scatter(1, support, size * torch.randn(300, k, generator=generator).sign())
    code = omp(x @ matrix.to_dense().T, matrix, k, backend=backend)
    torch.testing.assert_close(code.to_dense(96), x, atol=0, rtol=1e-3)


def test_a_smaller_coefficient_on_an_earlier_column_is_found_second(matrix: Matrix) -> None:
    # scikit-learn's check for swapped regressors.
    x = torch.zeros(1, N, dtype=torch.float64)
    x[0, 21], x[0, 0] = 1.0, 0.5
    code = omp(x @ matrix.to_dense().T, matrix, 2)
    assert code.indices.tolist() == [[21, 0]]
    torch.testing.assert_close(code.to_dense(N), x)


# Degenerate inputs; in float32 the expander cases run through the C++ kernels.

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_columns_are_taken_once(make_matrix, dtype: torch.dtype) -> None:
    base = make_matrix(dtype=dtype)
    twice = base.subset(torch.arange(N).repeat_interleave(2))
    h = gaussian(8, dtype=dtype)
    code, expected = omp(h, twice, 20), omp(h, base, 20)
    assert torch.equal(code.indices, expected.indices * 2)  # ties go to the lower index
    torch.testing.assert_close(code.values, expected.values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"block": 3}, {"block": 8}])
def test_dependent_columns_are_passed_over(dtype: torch.dtype, options: dict) -> None:
    # Columns 0..3 span two rows only; column 4 is needed as well.
    rows = torch.tensor([[0, 1]] * 4 + [[2, 3]], dtype=torch.int32)
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=dtype)
    for matrix in (ExpanderMatrix(rows, values, 4), dense(ExpanderMatrix(rows, values, 4))):
        h = torch.tensor([[3.0, 2.0, 0.5, 0.5]], dtype=dtype)
        code = omp(h, matrix, 5, **{name: min(value, 5) for name, value in options.items()})
        assert code.residual_norms.item() < 1e-5
        assert code.values.isfinite().all()
        assert (code.values != 0).sum() == 3
        assert code.stopped_early.all()


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("block", [1, 2])
def test_a_nearly_dependent_column_ends_the_pursuit(backend: str | None, block: int) -> None:
    # Its correlation with the residual is well above rounding, its distance to the span is not.
    rows = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    matrix = ExpanderMatrix(rows, torch.tensor([[1.0, 0.0], [1.0, 5e-4]]), 2)
    for either in (matrix, dense(matrix)):
        code = omp(torch.tensor([[1.0, 0.5]]), either, 2, block=block, backend=backend)
        assert code.values.abs().max() < 2
        assert code.stopped_early.all()


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_feature_for_which_a_round_had_no_room_is_looked_at_again(backend: str | None) -> None:
    # The first round takes 1 and passes over 0, the second passes over 2 and has no second place for 3.
    columns = torch.tensor([[1, 0, 0], [1, 5e-4, 0], [1, -5e-4, 0], [0, 0, 1]])
    matrix = ExpanderMatrix(torch.arange(3, dtype=torch.int32).repeat(4, 1), columns, 3)
    for either in (matrix, dense(matrix)):
        code = omp(torch.tensor([[1.0, 0.5, 1e-4]]), either, 2, block=2, backend=backend)
        assert code.indices.tolist() == [[1, 3]]
        assert code.iterations.tolist() == [3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_columns_are_never_taken(make_matrix, dtype: torch.dtype) -> None:
    matrix = make_matrix(dtype=dtype)
    if isinstance(matrix, ExpanderMatrix):
        matrix.values[::2] = 0
    else:
        matrix.values[::2] = 0
    code = omp(gaussian(8, dtype=dtype), matrix, 12)
    assert (code.indices % 2 == 1).all()
    assert code.values.isfinite().all()
    nothing = omp(gaussian(3, dtype=dtype), matrix.subset(torch.arange(0, N, 2)), 12)
    assert (nothing.values == 0).all()
    assert nothing.stopped_early.all()
    assert (nothing.iterations == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"block": 4}, {"nonnegative": True}, {"tol": 0.1}, {"tol": 0.0}])
def test_zero_samples_have_empty_codes(make_matrix, dtype: torch.dtype, options: dict) -> None:
    h = gaussian(5, dtype=dtype)
    h[1] = h[4] = 0
    code = omp(h, make_matrix(dtype=dtype), 6, **options)
    assert (code.values[[1, 4]] == 0).all()
    assert (code.residual_norms[[1, 4]] == 0).all()
    assert (code.iterations[[1, 4]] == 0).all()
    assert code.stopped_early[[1, 4]].all()
    assert not code.stopped_early[[0, 2, 3]].any() or "tol" in options


@pytest.mark.parametrize("dtype", DTYPES)
def test_k_beyond_the_rank_stops_early(make_matrix, dtype: torch.dtype) -> None:
    matrix = make_matrix(12, 40, 3, dtype=dtype)
    h = gaussian(8, 12, dtype=dtype)
    code = omp(h, matrix, 30)
    assert code.stopped_early.all()
    assert (code.iterations <= 12).all()
    assert code.values.isfinite().all()
    assert (code.residual_norms < 1e-4 * h.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_outside_the_span_stops_early(dtype: torch.dtype) -> None:
    matrix = expander(8, 40, 4, dtype=dtype)
    wider = ExpanderMatrix(matrix.rows, matrix.values, 10)  # rows 8 and 9 are covered by no column
    h = gaussian(6, 10, dtype=dtype)
    code = omp(h, wider, 20)
    assert code.stopped_early.all()
    torch.testing.assert_close(code.residual_norms, h[:, 8:].norm(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_refused(matrix: Matrix, value: float) -> None:
    h = gaussian(4)
    h[2, 5] = value
    with pytest.raises(ValueError, match="1 of 4 samples have entries that are not finite"):
        omp(h, matrix, 3)


def test_bad_arguments_are_named(matrix: Matrix) -> None:
    h = gaussian(4)
    with pytest.raises(ValueError, match=f"k must be between 1 and d_sae = {N}, got 0"):
        omp(h, matrix, 0)
    with pytest.raises(ValueError, match="got 161"):
        omp(h, matrix, N + 1)
    with pytest.raises(ValueError, match="block must be between 1 and k = 4, got 5"):
        omp(h, matrix, 4, block=5)
    with pytest.raises(ValueError, match="tol is a fraction"):
        omp(h, matrix, 4, tol=-0.1)
    with pytest.raises(ValueError, match=f"d_in = {M}"):
        omp(h[:, :-1], matrix, 4)
    with pytest.raises(ValueError, match="b_dec must have shape"):
        omp(h, matrix, 4, b_dec=h)
    with pytest.raises(TypeError, match="floating point"):
        omp(h.long(), matrix, 4)
    with pytest.raises(TypeError, match="Dictionary"):
        omp(h, type("Odd", (), {"detach": lambda self: self, "d_in": M, "d_sae": N, "dtype": h.dtype})(), 4)
    with pytest.raises(ValueError, match="unknown backend"):
        omp(h, matrix, 4, backend="gpu")


def test_disjoint_needs_an_expander() -> None:
    with pytest.raises(ValueError, match="needs an expander dictionary"):
        omp(gaussian(2), dense(expander()), 4, block=2, disjoint=True)


def test_ols_takes_the_column_that_lowers_the_residual_most(make_matrix) -> None:
    matrix, h = make_matrix(24, 40, 4), gaussian(2, 24)
    code = ols(h, matrix, 5)
    columns = matrix.to_dense()
    for b in range(2):
        chosen: list[int] = []
        for _ in range(5):
            best = (float("inf"), -1)
            for j in set(range(40)) - set(chosen):
                support = columns[:, [*chosen, j]]
                solution = torch.linalg.lstsq(support, h[b, :, None]).solution
                best = min(best, (float((h[b] - (support @ solution)[:, 0]).norm()), j))
            chosen.append(best[1])
        assert code.indices[b].tolist() == chosen
    torch.testing.assert_close(code.values, least_squares(h, matrix, code), atol=1e-9, rtol=1e-9)


def test_ols_is_no_worse_than_omp_on_average(matrix: Matrix) -> None:
    h = gaussian(40)
    assert ols(h, matrix, 16).residual_norms.mean() < omp(h, matrix, 16).residual_norms.mean()


def test_ols_bears_degenerate_columns(make_matrix) -> None:
    matrix = make_matrix(12, 40, 3)
    code = ols(gaussian(6, 12), matrix.subset(torch.arange(40).repeat(2)), 30)
    assert code.values.isfinite().all()
    assert code.stopped_early.all()
    assert (code.residual_norms < 1e-9).all()


@given(n=st.sampled_from([1, 63, 64, 100, 128, 256]), seed=st.integers(0, 1000), spread=st.integers(1, 300))
def test_the_best_is_the_first_among_equals(n: int, seed: int, spread: int) -> None:
    score = torch.randint(-1, spread, (5, n), generator=torch.Generator().manual_seed(seed)).float()
    strength, feature = selection.best(score, 1)
    assert feature[:, 0].tolist() == [row.index(max(row)) for row in score.tolist()]
    assert torch.equal(strength[:, 0], score.amax(dim=1))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 40),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_any_shape(m: int, n: int, data: st.DataObject, dtype: torch.dtype, seed: int) -> None:
    degree = data.draw(st.integers(1, m), "degree")
    k = data.draw(st.integers(1, n), "k")
    block = data.draw(st.integers(1, k), "block")
    batch = data.draw(st.integers(0, 20), "batch")
    disjoint = data.draw(st.booleans(), "disjoint")
    backend = data.draw(st.sampled_from([None, "reference"]), "backend")
    matrix = expander(m, n, degree, seed=seed, dtype=dtype)
    h = gaussian(batch, m, seed=seed, dtype=dtype)
    code = omp(h, matrix, k, block=block, disjoint=disjoint, backend=backend)
    used = code.values != 0
    assert code.values.isfinite().all()
    assert (code.residual_norms <= h.norm(dim=1) * (1 + 1e-5)).all()
    assert torch.equal(code.stopped_early | used.all(dim=1), torch.ones(batch, dtype=torch.bool))
    small = 1e-3 if dtype == torch.float32 else 1e-8
    left = residual(h, matrix, code)
    assert (matrix.correlate_at(left, code.indices).abs() * used <= small * h.norm(dim=1, keepdim=True)).all()
    for row, mask in zip(code.indices, used, strict=True):
        assert len(set(row[mask].tolist())) == int(mask.sum())
