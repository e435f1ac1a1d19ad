"""What a :class:`Selection` takes, on every backend, against a sort written out; its gradients; the look for NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from expander_sae import ops
from expander_sae.mask import Mask
from expander_sae.ops import Selection, SparseCode, dense
from expander_sae.ops.fused import tied_error

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = [
    "reference",
    "dense",
    pytest.param("cpu", marks=pytest.mark.skipif(not ops.has_fast_cpu(), reason="no C++ kernels")),
]
INF, NAN = math.inf, math.nan


def encode(
    backend: str, h: Tensor, rows: Tensor, values: Tensor, bias: Tensor | None, selection: Selection, **options: object
) -> SparseCode:
    """``ops.encode`` on a backend, ``"dense"`` being the dense dictionary with the same columns."""
    if backend != "dense":
        return ops.encode(h, rows, values, bias, selection, backend=backend, **options)  # type: ignore[arg-type]
    weight = values.new_zeros(values.shape[0], h.shape[-1]).scatter(1, rows.long(), values)
    return dense.encode(h, weight, bias, selection, **options)  # type: ignore[arg-type]


def written_out(scores: Tensor, selection: Selection) -> tuple[list[list[int]], list[list[float]]]:
    """Indices and values by the words of the docstring, sample by sample."""
    indices, values = [], []
    per_feature = selection.threshold if isinstance(selection.threshold, Tensor) else None
    limit = -INF if selection.threshold is None or per_feature is not None else float(selection.threshold)  # type: ignore[arg-type]
    for sample in scores.tolist():
        z = dict(enumerate(sample))
        if per_feature is not None:
            rank, limit = {j: z[j] - float(per_feature[j]) for j in z}, 0.0
        else:
            rank = {j: abs(z[j]) if selection.rank == "magnitude" else z[j] for j in z}
        taken = [j for j in sorted(z, key=lambda j: (-rank[j], j)) if rank[j] > limit or limit == -INF]
        taken = taken[: selection.capacity]
        empty = selection.capacity - len(taken)
        indices.append(taken + [0] * empty)
        values.append([z[j] for j in taken] + [0.0] * empty)
    return indices, values


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_what_is_taken(backend: str, data: st.DataObject) -> None:
    """Whole numbers, which every type holds exactly: full of ties, at the threshold as well."""
    draw = data.draw
    m, n = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    batch, degree = draw(st.sampled_from([0, 1, 5])), draw(st.integers(1, min(m, 4)))
    dtype = draw(st.sampled_from(FLOATS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    rows = Mask.build("left-regular", d_in=m, d_sae=n, degree=degree, seed=1).rows
    h, values, bias, center = whole(batch, m), whole(n, degree), whole(n), whole(m)
    rank = draw(st.sampled_from(["signed", "magnitude"]))
    thresholds = [None, -1.0, 0.0, 1.0, 2.5, 99.0] + ([whole(n)] if rank == "signed" else [])
    selection = Selection(draw(st.integers(1, n)), draw(st.sampled_from(thresholds)), rank)  # type: ignore[arg-type]
    given_bias, given_center = draw(st.booleans()), draw(st.booleans())

    code = encode(backend, h, rows, values, bias if given_bias else None, selection,
                  center=center if given_center else None)  # fmt: skip
    read = h.double() - (center.double() if given_center else 0)
    matrix = torch.zeros(n, m, dtype=torch.float64).scatter(1, rows.long(), values.double())
    indices, taken = written_out(read @ matrix.T + (bias.double() if given_bias else 0), selection)
    assert code.indices.shape == code.values.shape == (batch, selection.capacity)
    assert code.indices.dtype == torch.int32
    assert code.values.dtype == dtype
    assert code.indices.tolist() == indices
    assert code.values.tolist() == taken


#  A dictionary that hands the sample on: the scores are the sample itself.
def own_scores(
    backend: str, scores: list[float], selection: Selection, bias: list[float] | None = None
) -> tuple[list[int], list[float]]:
    n = len(scores)
    rows, values = torch.arange(n, dtype=torch.int32).unsqueeze(1), torch.ones(n, 1)
    given_bias = None if bias is None else torch.tensor(bias)
    code = encode(backend, torch.tensor([scores]), rows, values, given_bias, selection)
    return code.indices[0].tolist(), code.values[0].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_cases_written_by_hand(backend: str) -> None:
    scores = [3.0, -4.0, 1.0, 0.0, 5.0]
    assert own_scores(backend, scores, Selection(3)) == ([4, 0, 2], [5, 3, 1])
    assert own_scores(backend, scores, Selection(4, 0.0)) == ([4, 0, 2, 0], [5, 3, 1, 0])
    assert own_scores(backend, scores, Selection(2, 3.0)) == ([4, 0], [5, 0])  # a score equal to it is not above it
    assert own_scores(backend, scores, Selection(2, 5.0)) == ([0, 0], [0, 0])
    assert own_scores(backend, scores, Selection(2, INF)) == ([0, 0], [0, 0])
    assert own_scores(backend, scores, Selection(2, -INF)) == ([4, 0], [5, 3])
    assert own_scores(backend, scores, Selection(1, 0.0)) == ([4], [5])  # overflow: the best stays
    assert own_scores(backend, scores, Selection(4, 2.0, "magnitude")) == ([4, 1, 0, 0], [5, -4, 3, 0])
    assert own_scores(backend, scores, Selection(2, torch.tensor([0.0, -9, 0, -1, 4]))) == ([1, 0], [-4, 3])
    assert own_scores(backend, scores, Selection(3, torch.full((5,), 9.0))) == ([0, 0, 0], [0, 0, 0])
    assert own_scores(backend, scores, Selection(2, torch.tensor([2.0, 9, 9, 9, 9])), [0.0, 14, 0, 0, 0]) == (
        [0, 1],
        [3, 10],
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", ["signed", "magnitude"])
def test_nan_shows_whatever_the_threshold(backend: str, rank: str) -> None:
    bias = [0.0, NAN, 0.0]
    indices, values = own_scores(backend, [1.0, 1.0, 2.0], Selection(3, 1.5, rank), bias)  # type: ignore[arg-type]
    assert indices == [1, 2, 0]
    assert math.isnan(values[0])
    assert values[1:] == [2, 0]
    if rank == "signed":
        indices, values = own_scores(backend, [1.0, 1.0, 2.0], Selection(2, torch.full((3,), 1.5)), bias)
        assert indices == [1, 2]
        assert math.isnan(values[0])


# Gradients


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


M, N, D, B = 7, 11, 3, 4
ROWS = Mask.build("left-regular", d_in=M, d_sae=N, degree=D, seed=1).rows
SELECTIONS = {
    "no threshold": Selection(4),
    "relu": Selection(N, 0.0),
    "above": Selection(6, 0.7),
    "below": Selection(N, -0.7),
    "magnitude": Selection(N, 0.9, "magnitude"),
    "by feature": Selection(6, torch.linspace(-1, 1, N, dtype=torch.float64)),
    "nothing": Selection(3, 99.0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SELECTIONS)
def test_gradients_of_every_input(backend: str, name: str) -> None:
    selection = SELECTIONS[name]

    def code(h: Tensor, values: Tensor, bias: Tensor, center: Tensor) -> Tensor:
        return encode(backend, h, ROWS, values, bias, selection, center=center).values

    inputs = normal(B, M), normal(N, D), normal(N), normal(M)
    filled = code(*inputs) != 0
    assert name in ("no threshold", "nothing") or 0 < filled.sum() < filled.numel()
    assert gradcheck(code, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_slot_is_no_feature(backend: str) -> None:
    """Its index is 0, but feature 0 has no part in it."""
    values, bias, center = normal(N, D), normal(N), normal(M)
    h = normal(B, M)
    weight = [1.0 * s for s in range(1, 4)]
    code = encode(backend, h, ROWS, values, bias, Selection(3, 99.0), center=center)
    (code.values * torch.tensor(weight, dtype=torch.float64)).sum().backward()
    for leaf in (h, values, bias, center):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", range(4))
def test_only_the_gradient_that_is_asked_for(backend: str, wanted: int) -> None:
    tensors = [tensor.detach() for tensor in (normal(B, M), normal(N, D), normal(N), normal(M))]
    tensors[wanted].requires_grad_()
    h, values, bias, center = tensors
    encode(backend, h, ROWS, values, bias, Selection(3, 0.0), center=center).values.sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [place == wanted for place in range(4)]


@pytest.mark.parametrize("threshold", [0.0, 0.7, -0.7, torch.linspace(-1, 1, N, dtype=torch.float64)])
@pytest.mark.parametrize("rank", ["signed", "magnitude"])
def test_the_fused_step_selects_alike(threshold: float | Tensor, rank: str) -> None:
    if isinstance(threshold, Tensor) and rank == "magnitude":
        return  # refused, below
    selection = Selection(6, threshold, rank)  # type: ignore[arg-type]
    inputs = normal(N, D), normal(N), normal(M)
    h = normal(B, M).detach()

    def run(function: Callable[[], tuple[Tensor, SparseCode]]) -> list[Tensor]:
        error, code = function()
        return [error.detach(), code.to_dense(N).detach(), *torch.autograd.grad(error, inputs)]

    def composed() -> tuple[Tensor, SparseCode]:
        values, b_enc, b_dec = inputs
        code = ops.encode(h, ROWS, values, b_enc, selection, center=b_dec, backend="reference")
        residual = h - ops.decode(code, ROWS, values, M, backend="reference") - b_dec
        return residual.square().sum(dim=1).mean(), code

    def fused() -> tuple[Tensor, SparseCode]:
        found = tied_error(h, ROWS, *inputs, selection)
        return found.error, found.code

    torch.testing.assert_close(run(fused), run(composed))


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_centre_is_not_rounded_to_the_type_of_the_data(backend: str, dtype: torch.dtype) -> None:
    center = torch.full((M,), 100.3).requires_grad_()
    h = (100 + 2 * normal(B, M).round()).detach().to(dtype)
    values = normal(N, D).detach().float().requires_grad_()
    code = encode(backend, h, ROWS, values, None, Selection(N), center=center)
    leaves = values.detach().double().requires_grad_(), center.detach().double().requires_grad_()
    exact = encode("reference", h.double(), ROWS, leaves[0], None, Selection(N), center=leaves[1])
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-3}
    torch.testing.assert_close(code.to_dense(N).double(), exact.to_dense(N), **close)
    code.values.sum().backward()
    expected = torch.autograd.grad(exact.values.sum(), leaves)
    torch.testing.assert_close(values.grad.double(), expected[0], **close)


# NaN and infinity in the activations


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("center", [False, True])
def test_samples_that_are_not_finite_are_counted(backend: str, dtype: torch.dtype, center: bool) -> None:
    m, n = 37, 50  # two whole vectors of the kernels and a rest
    rows = Mask.build("left-regular", d_in=m, d_sae=n, degree=3).rows
    values = torch.ones(n, 3, dtype=dtype)
    options = {"check_finite": True, "center": torch.zeros(m, dtype=dtype) if center else None}
    for places in ([(0, 0)], [(69, 36)], [(3, 20), (3, 21), (40, 0)], [(16, 35), (17, 35), (66, 1)]):
        for bad in (NAN, INF, -INF):
            h = torch.ones(70, m, dtype=dtype)
            for b, i in places:
                h[b, i] = bad
            count = len({b for b, _ in places})
            message = f"^{count} of the 70 activation vectors hold NaN or infinity; leave them out$"
            with pytest.raises(ValueError, match=message):
                encode(backend, h, rows, values, None, Selection(2), **options)
            encode(backend, h, rows, values, None, Selection(2))  # nobody asked


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_numbers_are_finite(backend: str, dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    h = torch.full((70, 37), top, dtype=dtype)
    h[1::2] = -top
    rows = Mask.build("left-regular", d_in=37, d_sae=50, degree=1).rows
    encode(backend, h, rows, torch.ones(50, 1, dtype=dtype), None, Selection(2), check_finite=True)
    encode(backend, h[:0], rows, torch.ones(50, 1, dtype=dtype), None, Selection(2), check_finite=True)


# Refused


def test_bad_selections() -> None:
    for capacity in (0, -3):
        with pytest.raises(ValueError, match=f"capacity must be at least 1, got {capacity}"):
            Selection(capacity)
    with pytest.raises(TypeError):
        Selection(2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN"):
        Selection(2, NAN)
    with pytest.raises(ValueError, match="rank must be 'signed' or 'magnitude', got 'absolute'"):
        Selection(2, None, "absolute")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="magnitude"):
        Selection(2, torch.zeros(N), "magnitude")
    with pytest.raises(AttributeError):
        Selection(2).capacity = 3  # type: ignore[misc]
    assert replace(Selection(2, 1.0), capacity=3) == Selection(3, 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_that_do_not_fit(backend: str) -> None:
    h, values = normal(B, M), normal(N, D)
    with pytest.raises(ValueError, match=rf"k must be between 1 and d_sae = {N}, got {N + 1}"):
        encode(backend, h, ROWS, values, None, Selection(N + 1))
    for shape in ((), (1,), (N + 1,)):
        with pytest.raises(ValueError, match=rf"threshold must have shape \({N},\)"):
            encode(backend, h, ROWS, values, None, Selection(2, torch.zeros(shape)))
        with pytest.raises(ValueError, match=rf"b_enc must have shape \({N},\)"):
            encode(backend, h, ROWS, values, torch.zeros(shape), Selection(2))
    for shape in ((), (1,), (M + 1,)):
        with pytest.raises(ValueError, match=rf"center must have shape \({M},\)"):
            encode(backend, h, ROWS, values, None, Selection(2), center=torch.zeros(shape))
