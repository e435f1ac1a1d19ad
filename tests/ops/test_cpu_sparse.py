"""decode, correlate_at, values_grad, gram and train_step in C++ against dense float64 algebra."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.kernels import FLOATS, Problem, best, problem, same_bits, threads
from torch import Tensor

from expander_sae.ops import Selection, cpu

if not cpu.available():
    pytest.skip("the C++ kernels are not built", allow_module_level=True)


@pytest.fixture(autouse=True, params=cpu.instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on every instruction set of this machine."""
    kernels = cpu._module()
    assert kernels.use_isa(request.param)
    yield request.param
    kernels.use_isa(cpu.instruction_sets()[0])


def dense_code(p: Problem) -> Tensor:
    """``(B, n)``; a feature named twice counts twice."""
    return torch.zeros(p.h.shape[0], p.rows.shape[0], dtype=torch.float64).scatter_add(
        1, p.indices.long(), p.code.double()
    )


def expected_values_grad(p: Problem) -> Tensor:
    """``(n, d)`` from the dense ``Σ_b x_b h_bᵀ``."""
    return (dense_code(p).T @ p.h.double()).gather(1, p.rows.long())


# name -> (what C++ says, what dense algebra says)
OPERATIONS: dict[str, tuple[Callable[[Problem], Tensor], Callable[[Problem], Tensor]]] = {
    "decode": (
        lambda p: cpu.decode(p.indices, p.code, p.rows, p.values, p.m),
        lambda p: dense_code(p) @ p.dense().T,
    ),
    "correlate_at": (
        lambda p: cpu.correlate_at(p.h, p.indices, p.rows, p.values),
        lambda p: (p.h.double() @ p.dense()).gather(1, p.indices.long()),
    ),
    "values_grad": (lambda p: cpu.values_grad(p.h, p.indices, p.code, p.rows), expected_values_grad),
    "gram": (
        lambda p: cpu.gram(p.indices, p.rows, p.values.to(p.h.dtype), p.m),
        lambda p: (w := p.dense().T[p.indices.long()]) @ w.mT,
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(data=st.data())
def test_exact_sums(name: str, data: st.DataObject) -> None:
    m, n = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 60))
    dtype = data.draw(st.sampled_from(FLOATS))
    p = problem(
        data.draw(st.sampled_from([0, 1, 7, 64, 130])),
        m,
        n,
        data.draw(st.integers(1, min(m, 9))),
        data.draw(st.integers(0, 12)),
        dtype=dtype,
        seed=data.draw(st.integers(0, 99)),
    )
    run, expected = OPERATIONS[name]
    with threads(data.draw(st.integers(1, 3))):
        found = run(p)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == (wide if name == "values_grad" else dtype)
    # Whole numbers small enough for every type but bfloat16, which rounds once at the end.
    assert torch.equal(found, expected(p).to(found.dtype))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_for_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    p = problem(150, 40, 3000, 6, 24, dtype=dtype, whole=False)
    p.indices[:, :12] %= 40  # some features far more active than others
    runs = []
    for count in (1, 2, 3, 8):
        with threads(count):
            runs.append(OPERATIONS[name][0](p))
    assert all(same_bits(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize("name", OPERATIONS)
def test_non_contiguous_inputs_and_poisoned_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(20, 30, 80, 4, 6)
    run, expected = OPERATIONS[name]
    apart = Problem(**{key: torch.stack([t, t], dim=-1)[..., 0] for key, t in vars(p).items()})
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: empty(*shape, **kw).fill_(77))
    assert torch.equal(run(apart).double(), expected(p))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("fault", [-1, 80, 2**31 - 1])
def test_an_index_out_of_range_is_an_error(name: str, fault: int) -> None:
    p = problem(200, 30, 80, 4, 6)
    p.indices[150, 3] = fault
    with pytest.raises(ValueError, match="index"):
        OPERATIONS[name][0](p)


@pytest.mark.parametrize("name", ["decode", "correlate_at", "values_grad"])
@pytest.mark.parametrize("fault", [-1, 30])
def test_a_row_out_of_range_is_an_error(name: str, fault: int) -> None:
    p = problem(20, 30, 80, 4, 6)
    p.rows[5, 2] = fault
    p.indices[3, 3] = 5
    with pytest.raises(ValueError, match="row"):
        OPERATIONS[name][0](p)


def test_half_precision_rounds_to_nearest_even() -> None:
    """Every float16 and bfloat16 survives a round trip, and sums round as torch rounds them."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 1)
        rows, zero = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(len(every), 1, dtype=torch.int32)
        kept = cpu.correlate_at(every, zero, rows, torch.ones(1, 1))
        assert torch.equal(kept.float().nan_to_num(nan=7.0), every.float().nan_to_num(nan=7.0))
        for factor in (1.0009765625, 1 / 3, 3e-5):
            scaled = cpu.correlate_at(every, zero, rows, torch.full((1, 1), factor))
            expected = (every.float() * torch.tensor(factor)).to(dtype)
            assert torch.equal(scaled.float().nan_to_num(nan=7.0), expected.float().nan_to_num(nan=7.0))


# ---------------------------------------------------------------------------------------------- the whole step


def by_hand(p: Problem, b_dec: Tensor, k: int, relu: bool) -> tuple[Tensor, ...]:
    """errors, residual, code and the gradients, by autograd through a dense matrix in float64."""
    w = p.dense().clone().requires_grad_()
    b_enc, center = p.b_enc.double().requires_grad_(), b_dec.double().requires_grad_()
    h = p.h.double()
    z = (h - center) @ w + b_enc
    chosen = best(z.detach(), k)[0].long()
    code = z.gather(1, chosen)
    if relu:
        code = code.relu()
    residual = h - torch.zeros_like(z).scatter(1, chosen, code) @ w.T - center
    errors = residual.square().sum(dim=1)
    errors.mean().backward()
    assert w.grad is not None
    assert b_enc.grad is not None
    assert center.grad is not None
    named = chosen.masked_fill(code == 0, 0) if relu else chosen
    return errors, residual, named.int(), code, w.grad.T.gather(1, p.rows.long()), b_enc.grad, center.grad


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("batch", [1, 15, 16, 17, 100, 128, 129, 300])
def test_train_step(batch: int, dtype: torch.dtype, relu: bool) -> None:
    p = problem(batch, 33, 400, 5, 1, dtype=dtype, whole=False, seed=batch)
    b_dec = torch.randn(33, dtype=p.values.dtype, generator=torch.Generator().manual_seed(1))
    if relu:
        p.b_enc -= 7
    step = cpu.train_step(p.h, p.rows, p.values, p.b_enc, b_dec, Selection(20, 0.0 if relu else None))
    expected = by_hand(p, b_dec, 20, relu)
    if relu and batch > 1:
        assert 0.05 < (step.code == 0).double().mean() < 0.95
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    for (name, found), right in zip(step._asdict().items(), expected, strict=True):
        if name == "indices":
            assert torch.equal(found, right)
        else:
            assert found.dtype == p.values.dtype
            assert (found.double() - right).abs().max() <= tolerance * right.abs().max(), name


@pytest.mark.parametrize("dtype", FLOATS)
def test_train_step_has_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    p = problem(200, 40, 3000, 6, 1, dtype=dtype, whole=False)
    runs = []
    for count in (1, 2, 3, 8):
        with threads(count):
            runs.append(cpu.train_step(p.h, p.rows, p.values, p.b_enc, torch.ones(40), Selection(24)))
    for run in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(run, runs[0], strict=True))


def test_train_step_writes_every_output(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(50, 40, 3000, 6, 1, whole=False)
    expected = cpu.train_step(p.h, p.rows, p.values, p.b_enc, torch.ones(40), Selection(24))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: empty(*shape, **kw).fill_(77))
    found = cpu.train_step(p.h, p.rows, p.values, p.b_enc, torch.ones(40), Selection(24))
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_train_step_errors() -> None:
    p = problem(4, 10, 20, 3, 2)
    b_dec = torch.zeros(10)
    with pytest.raises(ValueError, match="empty"):
        cpu.train_step(p.h[:0], p.rows, p.values, p.b_enc, b_dec, Selection(2))
    with pytest.raises(ValueError, match="b_dec"):
        cpu.train_step(p.h, p.rows, p.values, p.b_enc, b_dec[1:], Selection(2))
    with pytest.raises(ValueError, match="k must be between 1"):
        cpu.train_step(p.h, p.rows, p.values, p.b_enc, b_dec, Selection(31))
    with pytest.raises(ValueError, match="rows"):
        cpu.train_step(p.h, p.rows + 9, p.values, p.b_enc, b_dec, Selection(2))
