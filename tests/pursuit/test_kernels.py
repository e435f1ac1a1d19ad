"""The C++ pursuits against the PyTorch ones: same supports, same coefficients, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.pursuit import dense, expander, gaussian, needs_kernels, planted
from torch import Tensor

from expander_sae.dictionary import ExpanderMatrix
from expander_sae.ops import cpu as kernels
from expander_sae.pursuit import PursuitCode, matching_pursuit, omp

pytestmark = needs_kernels

OMP_OPTIONS = [
    {},
    {"block": 3},
    {"block": 4, "disjoint": True},
    {"block": 20},
    {"signed": True},
    {"block": 4, "disjoint": True, "signed": True},
    {"tol": 0.6},
    {"block": 4, "tol": 0.6},
    {"nonnegative": True},
    {"nonnegative": True, "block": 4},
    {"nonnegative": True, "block": 4, "disjoint": True},
]
MP_OPTIONS = [
    {},
    {"refit": False},
    {"reselect": True},
    {"reselect": True, "refit": False},
    {"signed": True},
    {"tol": 0.6},
    {"nonnegative": True},
    {"nonnegative": True, "refit": False},
]
CASES = [(omp, options) for options in OMP_OPTIONS] + [(matching_pursuit, options) for options in MP_OPTIONS]
INSTRUCTION_SETS = kernels.instruction_sets() if kernels.available() else []


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    from expander_sae import _kernels

    _kernels.use_isa(request.param)
    yield request.param
    _kernels.use_isa(INSTRUCTION_SETS[0])


def check_close(
    code: PursuitCode, expected: PursuitCode, h: Tensor, *, same: float = 1.0, tolerance: float = 2e-5
) -> None:
    """Equal residuals, and at least the share ``same`` of samples with the same features in the same order."""
    scale = h.norm(dim=1) + 1e-30
    gap = (code.residual_norms - expected.residual_norms).abs()
    equal = (code.indices == expected.indices).all(dim=1) & (code.iterations == expected.iterations)
    assert (gap <= tolerance * scale)[equal].all()
    assert equal.float().mean() >= same
    assert torch.equal(code.stopped_early[equal], expected.stopped_early[equal])
    error = (code.values - expected.values).abs().amax(dim=1)
    assert (error <= 1e-3 * scale)[equal].all()
    assert error[equal].median() <= 1e-5 * scale.median()


@pytest.mark.parametrize(("solver", "options"), CASES)
@pytest.mark.parametrize(("m", "n", "degree", "batch"), [(64, 160, 5, 37), (100, 700, 7, 16), (48, 130, 16, 3)])
def test_equals_the_reference(
    instruction_set: str, solver, options: dict, m: int, n: int, degree: int, batch: int
) -> None:
    matrix = expander(m, n, degree, dtype=torch.float32)
    h = gaussian(batch, m, dtype=torch.float32)
    code = solver(h, matrix, 20, backend="cpu", **options)
    check_close(code, solver(h, matrix, 20, backend="reference", **options), h)


@pytest.mark.parametrize("solver", [omp, matching_pursuit])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_samples_are_solved_in_float32(solver, dtype: torch.dtype) -> None:
    matrix = expander(dtype=torch.float32)
    h = gaussian(9).to(dtype)
    code, expected = solver(h, matrix, 8, backend="cpu"), solver(h.float(), matrix, 8, backend="cpu")
    assert torch.equal(code.indices, expected.indices)
    assert torch.equal(code.values, expected.values.to(dtype))


@pytest.mark.parametrize(("solver", "options"), CASES)
def test_bits_do_not_depend_on_threads_or_neighbours(solver, options: dict) -> None:
    matrix = expander(96, 400, 6, dtype=torch.float32)
    h = gaussian(75, 96, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        codes = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            codes.append(solver(h, matrix, 20, backend="cpu", **options))
    finally:
        torch.set_num_threads(before)
    codes.append(solver(h.flip(0), matrix, 20, backend="cpu", **options))
    turned = codes.pop()
    for name in ("indices", "values", "residual_norms", "iterations", "stopped_early"):
        first = getattr(codes[0], name)
        assert all(torch.equal(getattr(code, name), first) for code in codes)
        assert torch.equal(getattr(turned, name).flip(0), first)


@pytest.mark.parametrize("solver", [omp, matching_pursuit])
def test_wide_dictionaries(solver) -> None:
    # More than the L2 cache holds, so that two groups of samples share a pass.
    matrix = expander(96, 20000, 8, dtype=torch.float32)
    h = gaussian(40, 96, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        code = solver(h, matrix, 10, backend="cpu")
    finally:
        torch.set_num_threads(before)
    check_close(code, solver(h, matrix, 10, backend="reference"), h)


@pytest.mark.parametrize("solver", [omp, matching_pursuit])
def test_many_features_a_sample(solver) -> None:
    matrix = expander(400, 1500, 6, dtype=torch.float32)
    h = gaussian(5, 400, dtype=torch.float32)
    code, expected = (solver(h, matrix, 150, backend=backend) for backend in ("cpu", "reference"))
    torch.testing.assert_close(code.residual_norms, expected.residual_norms, rtol=1e-3, atol=0)


@pytest.mark.parametrize("options", [{}, {"block": 5}, {"block": 5, "disjoint": True}])
def test_planted_codes_are_recovered(instruction_set: str, options: dict) -> None:
    matrix = expander(256, 512, 8, dtype=torch.float32)
    h, x = planted(matrix, 33, 5)
    code = omp(h, matrix, 15, backend="cpu", **options)
    torch.testing.assert_close(code.to_dense(512), x, atol=1e-5, rtol=0)
    assert (code.residual_norms < 1e-5).all()
    assert code.stopped_early.all() or options  # a block takes other features, too, with coefficients of 0


def test_the_kernels_are_the_default_for_float32_only() -> None:
    matrix, h = expander(dtype=torch.float32), gaussian(5, dtype=torch.float32)
    chosen, forced = omp(h, matrix, 6), omp(h, matrix, 6, backend="cpu")
    assert torch.equal(chosen.values, forced.values)
    for wrong in (dense(matrix), expander()):
        with pytest.raises(ValueError, match="expander dictionaries in float32"):
            omp(h, wrong, 6, backend="cpu")


def test_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, h = expander(dtype=torch.float32), gaussian(5, dtype=torch.float32)
    monkeypatch.setenv("EXPANDER_SAE_BACKEND", "reference")

    def unwanted(*_: object, **__: object) -> None:
        raise AssertionError("the kernels were not asked for")

    with monkeypatch.context() as inner:
        inner.setattr("expander_sae.pursuit.cpu.omp", unwanted)
        omp(h, matrix, 6)
    # A preference, not a demand: what the kernels do not do still runs.
    monkeypatch.setenv("EXPANDER_SAE_BACKEND", "cpu")
    omp(h, dense(matrix), 6)


def test_rows_out_of_range_are_an_error() -> None:
    matrix = expander(dtype=torch.float32)
    rows = matrix.rows.clone()
    rows[3, 4] = matrix.d_in
    with pytest.raises(ValueError, match="rows holds an entry outside"):
        omp(gaussian(3, dtype=torch.float32), ExpanderMatrix(rows, matrix.values, matrix.d_in), 4, backend="cpu")


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 300),
    data=st.data(),
    seed=st.integers(0, 1000),
)
def test_any_shape(m: int, n: int, data: st.DataObject, seed: int) -> None:
    degree = data.draw(st.integers(1, min(m, 20)), "degree")
    k = data.draw(st.integers(1, min(n, 60)), "k")
    batch = data.draw(st.integers(1, 40), "batch")
    matrix = expander(m, n, degree, seed=seed, dtype=torch.float32)
    if data.draw(st.booleans(), "duplicates"):
        matrix = matrix.subset(torch.arange(n) // 2)
    h = gaussian(batch, m, seed=seed, dtype=torch.float32)
    if data.draw(st.booleans(), "zeros"):
        h[::3] = 0
    block = data.draw(st.integers(1, k), "block")
    disjoint = data.draw(st.booleans(), "disjoint")
    reselect = data.draw(st.booleans(), "reselect")
    nonnegative = data.draw(st.booleans(), "nonnegative")
    for code in (
        omp(h, matrix, k, block=block, disjoint=disjoint, nonnegative=nonnegative, backend="cpu"),
        matching_pursuit(h, matrix, k, reselect=reselect, nonnegative=nonnegative, backend="cpu"),
    ):
        assert not nonnegative or (code.values >= 0).all()
        assert code.values.isfinite().all()
        assert ((code.indices >= 0) & (code.indices < n)).all()
        residual = h - matrix.decode(code)
        torch.testing.assert_close(residual.norm(dim=1), code.residual_norms, atol=1e-4, rtol=1e-3)
        used = code.values != 0
        at_support = matrix.correlate_at(residual, code.indices).abs() * used
        assert (at_support <= 2e-3 * h.norm(dim=1, keepdim=True)).all()
