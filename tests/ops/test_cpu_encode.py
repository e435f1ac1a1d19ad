"""encode and correlate in C++ against a full stable sort of exact scores, on every instruction set here."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.kernels import FLOATS, Problem, best, problem, same_bits, threads
from torch import Tensor

from expander_sae.ops import cpu

if not cpu.available():
    pytest.skip("the C++ kernels are not built", allow_module_level=True)

BATCHES = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True, params=cpu.instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on every instruction set of this machine."""
    kernels = cpu._module()
    assert kernels.use_isa(request.param)
    yield request.param
    kernels.use_isa(cpu.instruction_sets()[0])


thresholds = st.sampled_from([-math.inf, -1.0, 0.0, 2.0])


def check_encode(
    p: Problem, k: int, *, magnitude: bool = False, threshold: float = -math.inf, bias: bool = True
) -> None:
    scores = p.scores() if bias else p.scores() - p.b_enc.double()
    indices, code = cpu.encode(
        p.h, p.rows, p.values, p.b_enc if bias else None, k, magnitude=magnitude, threshold=threshold
    )
    expected_indices, expected = best(scores, k, magnitude=magnitude, threshold=threshold)
    assert indices.dtype == torch.int32
    assert code.dtype == p.h.dtype
    assert torch.equal(indices, expected_indices)
    assert torch.equal(code.double().nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))


@given(data=st.data())
def test_exact_selection(data: st.DataObject) -> None:
    m, n = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 700))
    p = problem(
        data.draw(st.sampled_from(BATCHES)),
        m,
        n,
        data.draw(st.integers(1, min(m, 9))),
        1,
        dtype=data.draw(st.sampled_from(FLOATS)),
        seed=data.draw(st.integers(0, 99)),
    )
    k = data.draw(st.one_of(st.just(1), st.just(n), st.integers(1, n), st.integers(1, min(n, 20))))
    with threads(data.draw(st.integers(1, 3))):
        check_encode(
            p,
            k,
            threshold=data.draw(thresholds),
            magnitude=data.draw(st.booleans()),
            bias=data.draw(st.booleans()),
        )


@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 16, 33, 64, 65, 128, 200, 513, 1500])
@pytest.mark.parametrize("magnitude", [False, True])
def test_every_size_of_sort(k: int, magnitude: bool) -> None:
    check_encode(problem(20, 64, 1500, 5, 1, seed=k), k, magnitude=magnitude)


def test_full_degree() -> None:
    check_encode(problem(70, 24, 900, 24, 1), 30)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gaussian_scores(dtype: torch.dtype) -> None:
    """Without ties: chosen scores are the largest up to rounding, sorted, and those of their features."""
    p, k = problem(130, 96, 6000, 7, 1, dtype=dtype, whole=False), 48
    indices, code = cpu.encode(p.h, p.rows, p.values, p.b_enc, k)
    scores = p.scores()
    close = 1e-12 if dtype == torch.float64 else 1e-5
    rounded = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, close) * 20
    at = scores.gather(1, indices.long())
    assert (at - best(scores, k)[1]).abs().max() < close * 20
    assert (at - code.double()).abs().max() < rounded
    assert (code.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("batch", [0, 1, 3, 16, 65])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000])
def test_correlate(batch: int, n: int, dtype: torch.dtype) -> None:
    p = problem(batch, 40, n, 6, 1, dtype=dtype, seed=batch)
    z = cpu.correlate(p.h, p.rows, p.values)
    assert z.dtype == dtype
    assert torch.equal(z.double(), p.h.double() @ p.dense())


# ------------------------------------------------------------------ inputs made to mislead an estimated threshold


def test_scores_clustered_in_few_blocks() -> None:
    """Each sample's large scores sit in a few runs of 32 features, and k asks for more than there are large ones."""
    blocks, size = 128, 32
    generator = torch.Generator().manual_seed(0)
    n = blocks * size
    h = torch.zeros(200, blocks)
    for b in range(200):
        h[b, torch.randperm(blocks, generator=generator)[:5]] = 1
    p = problem(200, blocks, n, 1, 1)
    p.h, p.rows = h, torch.arange(blocks, dtype=torch.int32).repeat_interleave(size).unsqueeze(1)
    p.values = torch.randint(50, 100, (n, 1), generator=generator).float()
    p.b_enc = torch.randint(-9, 9, (n,), generator=generator).float()
    check_encode(p, 300)
    check_encode(p, 300, magnitude=True)


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("batch", "n", "k"), [(1, 9000, 40), (5, 20_000, 40), (70, 3000, 300), (40, 500, 500)])
def test_a_threshold_takes_from_the_same_bits(batch: int, n: int, k: int, dtype: torch.dtype, magnitude: bool) -> None:
    """The kernels start at the threshold; the answer is that without it, less what does not exceed it."""
    p = problem(batch, 50, n, 5, 1, dtype=dtype, whole=False)
    options = {"magnitude": magnitude}
    with threads(3):
        indices, code = cpu.encode(p.h, p.rows, p.values, p.b_enc, k, **options)
        wide = p.h if dtype == torch.float64 else p.h.float()
        exact = cpu.encode(wide, p.rows, p.values, p.b_enc, k, **options)[1]
        rank = exact.abs() if magnitude else exact
        on_a_score = [rank[0, 0].item(), rank[0, k // 2].item(), rank[-1, -1].item()]
        quantiles = [rank.double().quantile(share).item() for share in (0.02, 0.5, 0.98)]
        for threshold in (*on_a_score, *quantiles, rank.max().item() + 1, -1e30, math.inf):
            empty = rank.double() <= threshold
            expected = indices.masked_fill(empty, 0), code.masked_fill(empty, 0.0)
            found = cpu.encode(p.h, p.rows, p.values, p.b_enc, k, threshold=threshold, **options)
            assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True)), threshold


def test_a_threshold_that_few_scores_exceed() -> None:
    """Far fewer than k candidates in all, in one block, in no sample but some, and among NaN."""
    p = problem(90, 16, 6000, 2, 1)
    for threshold in (7.0, 9.0, 10.0, 11.0):
        check_encode(p, 200, threshold=threshold)
        check_encode(p, 200, threshold=threshold, magnitude=True)
    p.h[::3] = 0
    p.h[1::7, 4] = NAN
    p.b_enc[3000:3020] += 30
    for threshold in (0.0, 9.0, 20.0, 29.0, 32.0):
        check_encode(p, 10, threshold=threshold)
        check_encode(p, 200, threshold=threshold)
        check_encode(p, 3000, threshold=threshold, magnitude=True)


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "one"])
def test_scores_in_order_of_index(order: str) -> None:
    p = problem(66, 8, 5000, 1, 1)
    ramp = torch.arange(5000).float()
    p.b_enc = {"rising": ramp, "falling": -ramp, "equal": torch.ones(5000), "one": (ramp == 4321).float()}[order]
    p.h.zero_()
    check_encode(p, 100)
    check_encode(p, 100, magnitude=True)


def test_zero_samples_among_others() -> None:
    p = problem(90, 32, 3000, 4, 1)
    p.h[::3] = 0
    check_encode(p, 40, bias=False)


def test_negative_zero_ties_with_zero() -> None:
    p = problem(20, 8, 600, 2, 1)
    p.h[:] = -0.0  # with positive values and a bias of -0, a score of -0
    p.values.abs_()
    p.b_enc = torch.where(torch.arange(600) % 3 == 0, 0.0, -0.0)
    check_encode(p, 30)


@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("magnitude", [False, True])
def test_nan_and_infinity_in_samples(bad: float, magnitude: bool) -> None:
    p = problem(70, 30, 2000, 3, 1)
    p.h[3] = bad
    p.h[10:20, 5] = bad
    p.h[40, 7], p.h[40, 8] = INF, -INF
    for k in (1, 50, 2000):
        check_encode(p, k, magnitude=magnitude)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_and_infinity_in_the_dictionary(bad: float) -> None:
    p = problem(40, 30, 2000, 3, 1)
    p.b_enc[100:400] = bad
    check_encode(p, 64)
    p = problem(40, 30, 2000, 3, 1)
    p.values[100:400] = bad
    check_encode(p, 64)
    p.b_enc[:] = bad
    check_encode(p, 64)


def test_padded_lanes_stay_empty() -> None:
    """A tile of one sample has 15 lanes or more without one; a NaN bias must not fill their lists."""
    p = problem(1, 8, 4000, 2, 1)
    p.b_enc[:] = NAN
    check_encode(p, 10)


# ---------------------------------------------------------------------------------------------- threads and layout


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("batch", "n"), [(1, 9000), (5, 20_000), (100, 3000), (200, 3000)])
def test_same_bits_for_any_number_of_threads(batch: int, n: int, dtype: torch.dtype) -> None:
    p = problem(batch, 50, n, 5, 1, dtype=dtype, whole=False)
    runs = []
    for count in (1, 2, 3, 8):
        with threads(count):
            runs.append((*cpu.encode(p.h, p.rows, p.values, p.b_enc, 40), cpu.correlate(p.h, p.rows, p.values)))
    for run in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(run, runs[0], strict=True))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    p = problem(150, 50, 2500, 5, 1, whole=False)
    together = cpu.encode(p.h, p.rows, p.values, p.b_enc, 30)
    for b in (0, 70, 149):
        alone = cpu.encode(p.h[b : b + 1], p.rows, p.values, p.b_enc, 30)
        assert all(same_bits(one, many[b : b + 1]) for one, many in zip(alone, together, strict=True))


def test_non_contiguous_inputs() -> None:
    p = problem(40, 30, 500, 4, 1)
    expected = cpu.encode(p.h, p.rows, p.values, p.b_enc, 9)
    apart: list[Tensor] = [torch.stack([t, t], dim=-1)[..., 0] for t in (p.h, p.rows, p.values, p.b_enc)]
    assert not any(t.is_contiguous() for t in apart)
    found = cpu.encode(*apart, 9)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(37, 30, 777, 4, 1)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: empty(*shape, **kw).fill_(77))
    check_encode(p, 50)
    assert torch.equal(cpu.correlate(p.h, p.rows, p.values).double(), p.h.double() @ p.dense())


# ---------------------------------------------------------------------------------------------- errors


def test_errors_name_the_fault() -> None:
    p = problem(4, 10, 20, 3, 2)
    outside = p.rows.clone()
    outside[7, 1] = 10
    negative = p.rows.clone()
    negative[19, 2] = -1
    for rows in (outside, negative):
        with pytest.raises(ValueError, match="rows"):
            cpu.encode(p.h, rows, p.values, None, 2)
        with pytest.raises(ValueError, match="rows"):
            cpu.correlate(p.h, rows, p.values)
    for k in (-1, 0, 21):
        with pytest.raises(ValueError, match="k must be between 1 and d_sae = 20"):
            cpu.encode(p.h, p.rows, p.values, None, k)
    with pytest.raises(ValueError, match="b_enc"):
        cpu.encode(p.h, p.rows, p.values, p.b_enc[1:], 2)
    with pytest.raises(TypeError, match="int32"):
        cpu.encode(p.h, p.rows.long(), p.values, None, 2)
    with pytest.raises(TypeError, match="float32"):
        cpu.encode(p.h.int(), p.rows, p.values, None, 2)
    with pytest.raises(ValueError, match="one shape"):
        cpu.encode(p.h, p.rows, p.values[:, 1:], None, 2)
    with pytest.raises(ValueError, match="matrix"):
        cpu.encode(p.h[0], p.rows, p.values, None, 2)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """Offsets into the samples pass 2³¹; the zero pages in between cost no memory."""
    m, batch = 1 << 16, (1 << 15) + 70
    h = torch.zeros(batch, m, dtype=torch.bfloat16)
    h[-1, -1] = 3
    rows = torch.full((4, 1), m - 1, dtype=torch.int32)
    values = torch.tensor([[1.0], [4.0], [2.0], [-1.0]])
    indices, code = cpu.encode(h, rows, values, None, 2)
    assert indices[-1].tolist() == [1, 2]
    assert code[-1].tolist() == [12, 6]
    assert indices[:-1].eq(torch.tensor([0, 1])).all()
