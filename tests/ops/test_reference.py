"""The reference operations against an explicit dense masked matrix, and the order of equals by definition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expander_sae.mask import Mask
from expander_sae.ops import reference

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@dataclass
class Problem:
    """A random dictionary with its dense twin ``w (m, n)``, in float64, samples and a code."""

    h: Tensor
    rows: Tensor
    values: Tensor
    w: Tensor
    b_enc: Tensor
    indices: Tensor
    code: Tensor


def problem(m: int, n: int, d: int, batch: int, k: int, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = Mask.build("left-regular", d_in=m, d_sae=n, degree=d, seed=seed)
    values = normal(n, d)
    w = torch.zeros(m, n, dtype=torch.float64)
    for j in range(n):
        for t in range(d):
            w[mask.rows[j, t], j] = values[j, t]
    indices = torch.randint(0, n, (batch, k), generator=generator, dtype=torch.int32)  # repetitions included
    return Problem(normal(batch, m), mask.rows, values, w, normal(n), indices, normal(batch, k))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 20))
    d, k = draw(st.integers(1, m)), draw(st.integers(1, n))
    return problem(m, n, d, draw(st.integers(0, 5)), k, draw(st.integers(0, 1000)))


def plain_top(z: list[float], k: int, magnitude: bool = False) -> list[int]:
    """Positions of the ``k`` largest by definition: NaN before all, then by value, then by position."""

    def rank(j: int) -> tuple[bool, float, int]:
        score = abs(z[j]) if magnitude else z[j]
        return (not math.isnan(score), 0.0 if math.isnan(score) else -score, j)

    return sorted(range(len(z)), key=rank)[:k]


@given(p=problems())
def test_correlate(p: Problem) -> None:
    torch.testing.assert_close(reference.correlate(p.h, p.rows, p.values), p.h @ p.w)


@given(p=problems(), bias=st.booleans(), threshold=st.sampled_from([-math.inf, 0.0, 1.0]), magnitude=st.booleans())
def test_encode(p: Problem, bias: bool, threshold: float, magnitude: bool) -> None:
    k = p.indices.shape[1]
    z = p.h @ p.w + (p.b_enc if bias else 0)
    indices, values = reference.encode(
        p.h, p.rows, p.values, p.b_enc if bias else None, k, magnitude=magnitude, threshold=threshold
    )
    assert indices.dtype == torch.int32
    order = torch.tensor([plain_top(row, k, magnitude) for row in z.tolist()], dtype=torch.int64).reshape(len(z), k)
    chosen = z.gather(1, order)
    empty = (chosen.abs() if magnitude else chosen) <= threshold
    assert indices.tolist() == order.masked_fill(empty, 0).tolist()
    torch.testing.assert_close(values, chosen.masked_fill(empty, 0.0))


@given(p=problems())
def test_decode_adds_up_repeated_features(p: Problem) -> None:
    m, n = p.w.shape
    x = torch.zeros(p.code.shape[0], n, dtype=torch.float64)
    for b in range(x.shape[0]):
        for s in range(p.code.shape[1]):
            x[b, p.indices[b, s]] += p.code[b, s]
    torch.testing.assert_close(reference.decode(p.indices, p.code, p.rows, p.values, m), x @ p.w.T)


@given(p=problems())
def test_correlate_at(p: Problem) -> None:
    torch.testing.assert_close(
        reference.correlate_at(p.h, p.indices, p.rows, p.values), (p.h @ p.w).gather(1, p.indices.long())
    )


@given(p=problems())
def test_values_grad(p: Problem) -> None:
    expected = torch.zeros_like(p.values)
    for b in range(p.h.shape[0]):
        for s, j in enumerate(p.indices[b].tolist()):
            expected[j] += p.code[b, s] * p.h[b, p.rows[j].long()]
    torch.testing.assert_close(reference.values_grad(p.h, p.indices, p.code, p.rows), expected)


@given(p=problems())
def test_gram(p: Problem) -> None:
    columns = p.w.T[p.indices.long()]
    torch.testing.assert_close(reference.gram(p.indices, p.rows, p.values, p.h.shape[1]), columns @ columns.mT)


def test_to_dense() -> None:
    p = problem(6, 9, 3, 1, 1)
    assert torch.equal(reference.to_dense(p.rows, p.values, 6), p.w)


scores = st.one_of(st.integers(-2, 2).map(float), st.sampled_from([math.nan, math.inf, -math.inf, -0.0]))


@given(
    rows=st.integers(1, 12).flatmap(lambda n: st.lists(st.lists(scores, min_size=n, max_size=n), max_size=4)),
    data=st.data(),
)
def test_top_positions_among_ties_nan_and_infinities(rows: list[list[float]], data: st.DataObject) -> None:
    n = len(rows[0]) if rows else 3
    k = data.draw(st.integers(0, n))
    found = reference.top_positions(torch.tensor(rows).reshape(-1, n), k)
    assert found.tolist() == [plain_top(row, k) for row in rows]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 20])
def test_feature_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(4, 20, 2, 6, 5)
    p.values[7], p.values[13] = p.values[2], p.values[2]
    rows = p.rows.clone()
    rows[7], rows[13] = rows[2], rows[2]  # equal scores in different blocks
    p.h[1, 0] = math.nan
    h, bias = p.h, torch.zeros(20, dtype=torch.float64)
    whole = [reference.encode(h, rows, p.values, bias, k) for k in (1, 5, 20)]
    scores_ = reference.correlate(h, rows, p.values)
    monkeypatch.setattr(reference, "FEATURE_BLOCK", block)
    torch.testing.assert_close(reference.correlate(h, rows, p.values), scores_, equal_nan=True)
    for k, (indices, values) in zip((1, 5, 20), whole, strict=True):
        again = reference.encode(h, rows, p.values, bias, k)
        assert torch.equal(again[0], indices)
        torch.testing.assert_close(again[1], values, equal_nan=True)


def test_identical_columns_come_in_index_order() -> None:
    rows = torch.tensor([[0, 1]] * 6, dtype=torch.int32)
    values = torch.tensor([[1.0, 1.0]] * 6)
    indices, _ = reference.encode(torch.ones(2, 3), rows, values, None, 4)
    assert indices.tolist() == [[0, 1, 2, 3]] * 2
    bias = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    indices, _ = reference.encode(torch.ones(2, 3), rows, values, bias, 4)
    assert indices.tolist() == [[1, 3, 0, 2]] * 2


def test_nan_ranks_first_and_shows() -> None:
    rows = torch.tensor([[0], [1], [2], [1]], dtype=torch.int32)
    h = torch.tensor([[5.0, math.nan, 7.0]])
    for magnitude in (False, True):
        indices, values = reference.encode(h, rows, torch.ones(4, 1), None, 3, magnitude=magnitude)
        assert indices.tolist() == [[1, 3, 2]]
        assert values.isnan().tolist() == [[True, True, False]]
    _, clipped = reference.encode(h, rows, torch.ones(4, 1), None, 3, threshold=0.0)
    assert clipped.isnan().tolist() == [[True, True, False]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_type_is_rounded_once(dtype: torch.dtype) -> None:
    """The result is the exact result on the rounded inputs, rounded once: within one unit in the last place."""
    p = problem(40, 60, 30, 9, 7)
    h, values, bias, code = (x.to(dtype) for x in (p.h, p.values, p.b_enc, p.code))
    wide = [x.double() for x in (h, values, bias, code)]
    m, k = 40, 7
    pairs = [
        (reference.correlate(h, p.rows, values), reference.correlate(wide[0], p.rows, wide[1])),
        (
            reference.decode(p.indices, code, p.rows, values, m),
            reference.decode(p.indices, wide[3], p.rows, wide[1], m),
        ),
        (
            reference.correlate_at(h, p.indices, p.rows, values),
            reference.correlate_at(wide[0], p.indices, p.rows, wide[1]),
        ),
        (reference.gram(p.indices, p.rows, values, m), reference.gram(p.indices, p.rows, wide[1], m)),
        (
            reference.encode(h, p.rows, values, bias, k)[1],
            reference.encode(wide[0], p.rows, wide[1], wide[2], k)[1],
        ),
    ]
    for found, exact in pairs:
        assert found.dtype == dtype
        # Cancellation leaves float32's error on small sums, hence the absolute term.
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-5)
    grad = reference.values_grad(h, p.indices, code, p.rows)
    assert grad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        grad.double(), reference.values_grad(wide[0], p.indices, wide[3], p.rows), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_selection_sees_more_than_sixteen_bits(dtype: torch.dtype) -> None:
    # Both sums round to 1 in 16 bits; column 1 is larger by 2^-12.
    rows = torch.tensor([[0, 2], [0, 1]], dtype=torch.int32)
    h = torch.tensor([[1.0, 2.0**-12, 0.0]], dtype=dtype)
    indices, values = reference.encode(h, rows, torch.ones(2, 2, dtype=dtype), None, 2)
    assert indices.tolist() == [[1, 0]]
    assert values.tolist() == [[1.0, 1.0]]


def test_non_contiguous_inputs() -> None:
    p = problem(8, 10, 3, 6, 4)
    h, code = p.h.T.contiguous().T, p.code.T.contiguous().T
    rows, values = p.rows.T.contiguous().T, p.values.T.contiguous().T
    indices = p.indices.T.contiguous().T
    for tensor in (h, code, rows, values, indices):
        assert not tensor.is_contiguous()
    assert torch.equal(reference.correlate(h, rows, values), reference.correlate(p.h, p.rows, p.values))
    assert torch.equal(
        reference.decode(indices, code, rows, values, 8), reference.decode(p.indices, p.code, p.rows, p.values, 8)
    )
    assert torch.equal(
        reference.values_grad(h, indices, code, rows), reference.values_grad(p.h, p.indices, p.code, p.rows)
    )
    for strided, plain in zip(
        reference.encode(h, rows, values, p.b_enc, 4),
        reference.encode(p.h, p.rows, p.values, p.b_enc, 4),
        strict=True,
    ):
        assert torch.equal(strided, plain)
