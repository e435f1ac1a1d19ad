"""The Triton kernels against the reference. Run by ``test_triton.py`` in a process of its own, interpreted on the CPU.

On a machine with CUDA, ``pytest tests/ops/triton_cases.py`` runs the same cases compiled.

Most data are small integers: sums are exact in any order, so results, ties included, must be equal to the bit.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from expander_sae import ops
from expander_sae.mask import Mask
from expander_sae.ops import Selection, SparseCode, reference
from expander_sae.ops import triton as kernels
from expander_sae.ops.triton import active, scores, topk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tiny problems into several blocks, programs and passes, as large ones are."""
    monkeypatch.setattr(scores, "TILE_SCORES", 256)
    monkeypatch.setattr(topk, "_OVERFLOW_BLOCK", 16)
    monkeypatch.setattr(topk, "_SELECT_KEYS", 128)


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, top: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-top, top + 1, shape, generator=generator).to(DEVICE, dtype)


def mask_rows(m: int, n: int, d: int) -> Tensor:
    return Mask.build("left-regular", d_in=m, d_sae=n, degree=d, seed=1).rows.to(DEVICE)


def assert_same(found: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def check_encode(h: Tensor, rows: Tensor, values: Tensor, bias: Tensor | None, k: int, **options: bool) -> None:
    assert_same(
        kernels.encode(h, rows, values, bias, k, **options),
        reference.encode(h, rows, values, bias, k, **options),
    )


#  B, m, n, d, k
SHAPES = [
    (0, 6, 9, 2, 3),
    (1, 1, 1, 1, 1),
    (1, 9, 70, 4, 5),
    (63, 8, 24, 3, 2),
    (64, 5, 20, 5, 1),  # d = m
    (65, 6, 7, 1, 7),  # d = 1, k = n
    (5, 20, 60, 13, 4),  # d with a remainder after unrolling
]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for shape in SHAPES for dtype in DTYPES if shape[0] < 60 or dtype == torch.float32],
)
def test_all_operations(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, m, n, d, k = shape
    h, values, bias = integers(batch, m, dtype=dtype), integers(n, d, dtype=dtype), integers(n, dtype=dtype)
    rows, code = mask_rows(m, n, d), integers(batch, k, dtype=dtype, seed=5)
    indices = torch.randint(0, n, (batch, k), generator=torch.Generator().manual_seed(3)).to(DEVICE, torch.int32)
    check_encode(h, rows, values, bias, k)
    assert_same(kernels.correlate(h, rows, values), reference.correlate(h, rows, values))
    assert_same(kernels.decode(indices, code, rows, values, m), reference.decode(indices, code, rows, values, m))
    assert_same(kernels.correlate_at(h, indices, rows, values), reference.correlate_at(h, indices, rows, values))
    assert_same(kernels.values_grad(h, indices, code, rows), reference.values_grad(h, indices, code, rows))
    few = indices[:3]
    assert_same(kernels.gram(few, rows, values, 7), reference.gram(few, rows, values, 7))


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("threshold", [-math.inf, 0.0, 2.0])
@pytest.mark.parametrize("k", [2, 30])
def test_encode_options(k: int, threshold: float, magnitude: bool) -> None:
    h, values = integers(4, 7), integers(30, 3)
    check_encode(h, mask_rows(7, 30, 3), values, None, k, threshold=threshold, magnitude=magnitude)


@pytest.mark.parametrize("stride", [2, 4])
def test_bound_from_a_part_of_the_blocks(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def forced(batch: int, m: int, n: int, d: int, k: int, itemsize: int) -> topk.Plan:
        return topk.Plan(16, 16, -(-n // 16), stride, 2, topk.capacity(k, stride))

    monkeypatch.setattr(topk, "plan", forced)
    generator = torch.Generator().manual_seed(1)
    h, values = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((5, 12), (150, 4)))
    rows = mask_rows(12, 150, 4)
    indices, code = kernels.encode(h, rows, values, None, 4)
    expected_indices, expected = reference.encode(h, rows, values, None, 4)
    assert indices.tolist() == expected_indices.tolist()
    torch.testing.assert_close(code, expected)


def test_plan_at_the_sizes_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for m, n, d, k in ((512, 4096, 7, 64), (2048, 16384, 7, 64), (2048, 1 << 20, 7, 64), (576, 4608, 7, 32)):
        cut = topk.plan(8192, m, n, d, k, 2)
        assert m * cut.samples * 2 <= scores.TILE_BYTES
        assert cut.samples * cut.features == scores.TILE_SCORES
        assert cut.groups >= 4 * k
        assert cut.capacity >= 1.3 * k * cut.stride
        assert cut.blocks * cut.features >= n > (cut.blocks - 1) * cut.features
    assert topk.plan(8192, 2048, 1 << 20, 7, 64, 2).stride > 1, (
        "a million features: the bound must not cost a second pass"
    )


@pytest.mark.parametrize("magnitude", [False, True])
def test_more_candidates_than_room(magnitude: bool) -> None:
    """Rows of zeros: all scores are equal, and the lower indices win."""
    h = torch.zeros(3, 6, device=DEVICE)
    h[1] = integers(6)
    rows, values = mask_rows(6, 90, 2), integers(90, 2)
    assert topk.plan(3, 6, 90, 2, 3, 4).capacity < 90
    check_encode(h, rows, values, None, 3, magnitude=magnitude)
    assert kernels.encode(h, rows, values, None, 3)[0][0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("magnitude", [False, True])
def test_ordinary_data_fill_the_lists_as_planned(magnitude: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that is too low or too high costs time, not the answer: look at the lists themselves."""
    lists: list[Tensor] = []
    select = topk._select_kernel

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]):
            def launch(*args: Tensor, **kwargs: int) -> None:
                lists.append(args[2])
                select[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(topk, "_select_kernel", Spy())
    batch, m, n, d, k = 5, 12, 37, 4, 10
    generator = torch.Generator().manual_seed(2)
    h, values = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((batch, m), (n, d)))
    bias = torch.full((n,), 0.0 if magnitude else -99.0, device=DEVICE)  # what fills up a block must not look large
    kernels.encode(h, mask_rows(m, n, d), values, bias, k, magnitude=magnitude)
    (counts,) = lists
    # A group a feature: the bound is the k-th score itself, so exactly k reach it.
    assert counts.tolist() == [k] * batch + [0] * (len(counts) - batch)


@pytest.mark.parametrize("options", [{}, {"magnitude": True}, {"threshold": 0.0}])
def test_a_bound_that_is_too_high_is_noticed(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    class TooHigh:
        def __getitem__(self, _grid: object):
            def launch(maxima: Tensor, bounds: Tensor, counts: Tensor, *_: int, **__: int) -> None:
                bounds.fill_(torch.inf)
                counts.zero_()

            return launch

    monkeypatch.setattr(topk, "_threshold_kernel", TooHigh())
    check_encode(integers(3, 6), mask_rows(6, 45, 2), integers(45, 2), integers(45), 4, **options)


def test_settings_as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    check_encode(integers(5, 9), mask_rows(9, 300, 7), integers(300, 7), integers(300), 6)


def test_batch_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "BATCH_CHUNK", 3)
    check_encode(integers(8, 5), mask_rows(5, 20, 2), integers(20, 2), None, 3)


@pytest.mark.parametrize("magnitude", [False, True])
def test_not_a_number_and_infinity(magnitude: bool) -> None:
    m, n, d, k = 6, 40, 2, 5
    h, values, bias, rows = integers(6, m), integers(n, d), integers(n), mask_rows(m, n, d)
    h[0, 2], h[1, 3], h[2, 1], h[3] = torch.nan, torch.inf, -torch.inf, torch.nan
    bias[7], bias[9], bias[11] = torch.nan, torch.inf, -torch.inf
    check_encode(h, rows, values, bias, k, magnitude=magnitude)
    check_encode(h, rows, values, bias, n, magnitude=magnitude, threshold=0.0)
    indices, code = reference.encode(h, rows, values, None, k)
    assert_same(kernels.correlate(h, rows, values), reference.correlate(h, rows, values))
    assert_same(kernels.decode(indices, code, rows, values, m), reference.decode(indices, code, rows, values, m))
    assert_same(kernels.values_grad(h, indices, code, rows), reference.values_grad(h, indices, code, rows))
    assert_same(kernels.correlate_at(h, indices, rows, values), reference.correlate_at(h, indices, rows, values))


def test_nan_in_16_bit_values() -> None:
    h, values = integers(2, 6, dtype=torch.bfloat16), integers(40, 2, dtype=torch.bfloat16)
    values[3, 1], values[5, 0] = torch.nan, -torch.inf
    check_encode(h, mask_rows(6, 40, 2), values, None, 6)


@pytest.mark.parametrize("wide", [torch.float32, torch.float16, torch.float64])
def test_values_of_another_type(wide: torch.dtype) -> None:
    h, values, rows = integers(3, 7, dtype=torch.bfloat16), integers(30, 3, dtype=wide), mask_rows(7, 30, 3)
    bias = integers(30, dtype=torch.float32)
    check_encode(h, rows, values, bias, 4)
    indices, code = reference.encode(h, rows, values, bias, 4)
    assert_same(kernels.decode(indices, code, rows, values, 7), reference.decode(indices, code, rows, values, 7))
    assert_same(kernels.correlate_at(h, indices, rows, values), reference.correlate_at(h, indices, rows, values))


def test_words_of_the_dictionary() -> None:
    """16-bit values share 32 bits with their row, while rows fit in 16."""
    rows = torch.tensor([[1, 65_535], [0, 40_000]], dtype=torch.int32, device=DEVICE)
    values = torch.tensor([[1.5, -2.0], [-0.25, torch.inf]], device=DEVICE)
    for dtype in (torch.bfloat16, torch.float16):
        words = scores.pack(rows, values.to(dtype), 1 << 16).words
        assert words.dtype == torch.int32
        assert (words[:, :2] >> 16 & 0xFFFF).T.tolist() == rows.tolist()
        assert torch.equal(words.view(torch.int16)[:, ::2][:, :2].T.contiguous().view(dtype), values.to(dtype))
    for source, m in ((values, 1 << 16), (values.half(), (1 << 16) + 1)):
        words = scores.pack(rows, source, m).words
        assert words.dtype == torch.int64
        assert (words[:, :2] >> 32).T.tolist() == rows.tolist()
        assert torch.equal(words.view(torch.int32)[:, ::2][:, :2].T.contiguous().view(torch.float32), values)


def test_rows_in_the_upper_half_of_16_bits() -> None:
    m, n = 40_000, 20
    rows = torch.stack([torch.arange(n), torch.arange(n) + 39_900], dim=1).to(DEVICE, torch.int32)
    h, values = integers(2, m, dtype=torch.bfloat16), integers(n, 2, dtype=torch.bfloat16)
    check_encode(h, rows, values, None, 3)


def test_any_strides() -> None:
    batch, m, n, d, k = 3, 7, 30, 3, 4
    h, values, rows = integers(m, batch).T, integers(n, 2 * d)[:, ::2], mask_rows(m, n, d).T.contiguous().T
    bias, code = integers(2 * n)[::2], integers(k, batch).T
    indices = torch.randint(0, n, (k, batch), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.int32).T
    assert not any(t.is_contiguous() for t in (h, values, rows, bias, code, indices))
    check_encode(h, rows, values, bias, k)
    assert_same(kernels.correlate(h, rows, values), reference.correlate(h, rows, values))
    assert_same(kernels.decode(indices, code, rows, values, m), reference.decode(indices, code, rows, values, m))
    assert_same(kernels.correlate_at(h, indices, rows, values), reference.correlate_at(h, indices, rows, values))
    assert_same(kernels.values_grad(h, indices, code, rows), reference.values_grad(h, indices, code, rows))
    assert_same(kernels.gram(indices, rows, values, 7), reference.gram(indices, rows, values, 7))


def test_more_than_one_block_of_slots_and_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "_SLOTS", 4)
    monkeypatch.setattr(active, "_PAIRS", 4)
    batch, m, n, d, k = 3, 40, 6, 35, 7
    h, values, rows, code = integers(batch, m), integers(n, d), mask_rows(m, n, d), integers(batch, k)
    indices = torch.zeros(batch, k, dtype=torch.int32, device=DEVICE)  # one feature fires 21 times, the others never
    indices[0, 0] = 5
    assert_same(kernels.correlate_at(h, indices, rows, values), reference.correlate_at(h, indices, rows, values))
    assert_same(kernels.values_grad(h, indices, code, rows), reference.values_grad(h, indices, code, rows))
    assert_same(kernels.decode(indices, code, rows, values, m), reference.decode(indices, code, rows, values, m))
    rows, values = rows[:, :3].contiguous(), values[:, :3]
    assert_same(kernels.gram(indices, rows, values, 7), reference.gram(indices, rows, values, 7))


def test_sums_are_kept_in_float32() -> None:
    """In 16 bits a running sum of ones stops at 256."""
    batch, d = 300, 320
    rows = torch.arange(d, dtype=torch.int32, device=DEVICE)[None]
    h, values = (torch.ones(shape, dtype=torch.bfloat16, device=DEVICE) for shape in ((1, d), (1, d)))
    first = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    assert kernels.correlate_at(h, first, rows, values).item() == d
    assert kernels.encode(h, rows, values, None, 1)[1].item() == d
    ones = torch.ones(batch, 1, dtype=torch.bfloat16, device=DEVICE)
    grad = kernels.values_grad(ones, first.expand(batch, 1), ones, rows[:, :1])
    assert grad.dtype == torch.float32
    assert grad.item() == batch
    total = kernels.decode(first.expand(1, batch), ones.T, rows[:, :1], values[:, :1], 1)
    torch.testing.assert_close(total, torch.full((1, 1), float(batch), dtype=torch.bfloat16, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_through_the_operators(dtype: torch.dtype) -> None:
    m, n, d, k = 6, 25, 2, 3
    rows = mask_rows(m, n, d)

    def run(backend: str) -> list[Tensor]:
        leaves = [integers(*shape, dtype=dtype).requires_grad_() for shape in ((4, m), (n, d), (n,))]
        h, values, bias = leaves
        code = ops.encode(h, rows, values, bias, Selection(k), backend=backend)
        recon = ops.decode(code, rows, values, m, backend=backend)
        at = ops.correlate_at(recon, code.indices, rows, values, backend=backend)
        (recon.square().sum() + (code.values * at).sum()).backward()
        return [code.values, recon, *(leaf.grad for leaf in leaves)]

    for found, expected in zip(run("triton"), run("reference"), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("threshold", [None, 1.0, "by feature"])
def test_centre_and_thresholds_through_the_operators(threshold: float | str | None) -> None:
    m, n, d, k = 6, 25, 2, 20
    rows = mask_rows(m, n, d)
    chosen = integers(n, seed=4) if threshold == "by feature" else threshold
    selection = Selection(k, chosen)  # type: ignore[arg-type]

    def run(backend: str) -> list[Tensor]:
        leaves = [integers(*shape).requires_grad_() for shape in ((4, m), (n, d), (n,), (m,))]
        h, values, bias, center = leaves
        code = ops.encode(h, rows, values, bias, selection, center=center, backend=backend, check_finite=True)
        (code.values**2).sum().backward()
        return [code.indices, code.values, *(leaf.grad for leaf in leaves)]

    found = run("triton")
    assert threshold is None or (found[1] == 0).any()
    for one, expected in zip(found, run("reference"), strict=True):
        assert_same(one, expected)
    bad = integers(4, m)
    bad[1, 3] = torch.nan
    with pytest.raises(ValueError, match="1 of the 4 activation vectors"):
        ops.encode(bad, rows, integers(n, d), None, selection, backend="triton", check_finite=True)


@pytest.mark.parametrize("bias", [False, True])
def test_a_centre_is_not_rounded_to_the_type_of_the_data(bias: bool) -> None:
    m, n, d, k = 6, 25, 3, 25
    rows, values, center = mask_rows(m, n, d), integers(n, d), torch.full((m,), 100.3, device=DEVICE)
    h = (100 + integers(4, m)).bfloat16()
    options = {"center": center}
    given_bias = integers(n) if bias else None
    found, expected = (
        SparseCode(*backend.encode(h, rows, values, given_bias, k, **options)).to_dense(n)
        for backend in (kernels, reference)
    )
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=1e-3)


def test_nothing_to_do() -> None:
    rows, values = mask_rows(4, 9, 2), integers(9, 2)
    none = torch.empty(3, 0, dtype=torch.int32, device=DEVICE)
    assert_same(kernels.decode(none, none.float(), rows, values, 4), torch.zeros(3, 4, device=DEVICE))
    assert_same(kernels.values_grad(integers(3, 4), none, none.float(), rows), torch.zeros(9, 2, device=DEVICE))
    assert kernels.gram(none, rows, values, 7).shape == (3, 0, 0)


def test_long_codes_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_MAX_K", 4)
    monkeypatch.setattr(topk, "encode_topk", None)
    check_encode(integers(3, 4), mask_rows(4, 9, 2), integers(9, 2), None, 5)
    with pytest.raises(TypeError, match="NoneType"):
        kernels.encode(integers(3, 4), mask_rows(4, 9, 2), integers(9, 2), None, 4)


def test_same_bits_every_time() -> None:
    h, values, rows = (
        torch.randn(3 if INTERPRETED else 70, 8, device=DEVICE),
        torch.randn(40, 3, device=DEVICE),
        mask_rows(8, 40, 3),
    )
    first = kernels.encode(h, rows, values, None, 4)
    assert_same(kernels.encode(h, rows, values, None, 4), first)
    grad = kernels.values_grad(h, *first, rows)
    assert_same(kernels.values_grad(h, *first, rows), grad)


def test_bad_input_is_named() -> None:
    h, rows, values = integers(3, 4), mask_rows(4, 9, 2), integers(9, 2)
    indices, code = kernels.encode(h, rows, values, None, 2)
    with pytest.raises(ValueError, match=r"k must be between 1 and d_sae = 9, got 10"):
        kernels.encode(h, rows, values, None, 10)
    with pytest.raises(ValueError, match=r"b_enc must have shape \(9,\)"):
        kernels.encode(h, rows, values, integers(8), 2)
    with pytest.raises(TypeError, match="int32"):
        kernels.correlate(h, rows.long(), values)
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        kernels.correlate(h.long(), rows, values)
    with pytest.raises(ValueError, match="one shape"):
        kernels.correlate(h, rows, values[:, :1])
    with pytest.raises(ValueError, match="must be a matrix"):
        kernels.correlate(h[0], rows, values)
    with pytest.raises(TypeError, match="indices must be int32"):
        kernels.decode(indices.long(), code, rows, values, 4)
    with pytest.raises(ValueError, match=r"indices must have shape \(3, k\)"):
        kernels.correlate_at(h, indices[:2], rows, values)
    with pytest.raises(ValueError, match="coef"):
        kernels.values_grad(h, indices, code[:, :1], rows)
    with pytest.raises(ValueError, match="rows is on meta"):
        kernels.correlate(h, rows.to("meta"), values)


def test_available() -> None:
    assert kernels.available(DEVICE)
    assert kernels.why_not(DEVICE) == ""
    assert "not on meta" in kernels.why_not(torch.device("meta"))
    code = ops.encode(integers(2, 4), mask_rows(4, 9, 2), integers(9, 2), None, Selection(2), backend="triton")
    assert isinstance(code, SparseCode)
