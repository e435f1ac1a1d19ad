"""Dictionaries: every linear-map method against the dense matrix, storage counts, unit norm, rebuilding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from expander_sae.dictionary import (
    DenseDictionary,
    DenseMatrix,
    Dictionary,
    ExpanderDictionary,
    ExpanderMatrix,
    Matrix,
    dictionary_from,
    smallest_unsigned,
    unit_rows,
)
from expander_sae.mask import Mask
from expander_sae.ops import Selection, SparseCode
from expander_sae.stored import Section

M, N, D, K = 8, 13, 3, 4
MASK = Mask.build("left-regular", d_in=M, d_sae=N, degree=D, seed=2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expander(**options) -> ExpanderDictionary:
    return ExpanderDictionary(MASK, normal(N, D), **options)


def dense(**options) -> DenseDictionary:
    return DenseDictionary(normal(N, M), **options)


KINDS: dict[str, Callable[..., Dictionary]] = {"expander": expander, "dense": dense}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=list(KINDS))
unit = pytest.mark.parametrize("unit_norm", [True, False], ids=["unit norm", "free norm"])


def explicit(dictionary: Dictionary) -> Tensor:
    """``(m, n)`` column by column from the parameter."""
    if isinstance(dictionary, ExpanderDictionary):
        w = torch.zeros(M, N, dtype=torch.float64)
        for j in range(N):
            w[dictionary.rows[j].long(), j] = dictionary.values.detach()[j]
    else:
        w = dictionary.values.detach().T.clone()
    return w / w.norm(dim=0) if dictionary.unit_norm else w


@kinds
@unit
@pytest.mark.parametrize("shape", [(), (5,), (0,), (2, 3)])
def test_the_map_is_the_dense_one(make: Callable[..., Dictionary], unit_norm: bool, shape: tuple[int, ...]) -> None:
    dictionary = make(unit_norm=unit_norm)
    matrix, w = dictionary.matrix(), explicit(dictionary)
    assert (matrix.d_in, matrix.d_sae) == (dictionary.d_in, dictionary.d_sae) == (M, N)
    assert (matrix.dtype, matrix.device) == (torch.float64, torch.device("cpu"))
    h, bias = normal(*shape, M, seed=1), normal(N, seed=2)
    close = torch.testing.assert_close
    close(matrix.to_dense().detach(), w)
    close(dictionary.to_dense(), w)
    close(matrix.norms().detach(), w.norm(dim=0))
    z = h @ w
    close(matrix.correlate(h).detach(), z)
    code = matrix.select(h, bias, Selection(K))
    expected = (z + bias).topk(K, dim=-1)
    assert code.indices.tolist() == expected.indices.tolist()
    close(code.values.detach(), expected.values)
    signed = matrix.select(h, None, Selection(K, rank="magnitude"))
    assert signed.indices.tolist() == z.abs().topk(K, dim=-1).indices.tolist()
    close(matrix.select(h, bias - 1, Selection(K, 0.0)).values.detach(), (expected.values - 1).clamp_min(0))
    picked = code.indices.long()
    close(matrix.decode(code).detach(), (w.T[picked] * code.values.detach().unsqueeze(-1)).sum(dim=-2))
    close(matrix.correlate_at(h, code.indices).detach(), z.gather(-1, picked))
    close(matrix.columns(code.indices).detach(), w.T[picked])
    close(matrix.gram(code.indices).detach(), w.T[picked] @ w.T[picked].mT)


@kinds
def test_subset_and_detach(make: Callable[..., Dictionary]) -> None:
    matrix = make().matrix()
    features = torch.tensor([7, 0, 7, 12])
    part = matrix.subset(features)
    assert type(part) is type(matrix)
    assert part.d_sae == 4
    torch.testing.assert_close(part.to_dense(), matrix.to_dense()[:, features])
    assert matrix.to_dense().requires_grad
    assert not matrix.detach().to_dense().requires_grad


@kinds
@pytest.mark.parametrize(
    "call",
    [
        lambda matrix, h: matrix.correlate(h),
        lambda matrix, h: matrix.select(h, None, Selection(2)),
        lambda matrix, h: matrix.correlate_at(h, torch.zeros(h.shape[0], 2, dtype=torch.int32)),
    ],
)
@pytest.mark.parametrize("width", [M - 1, M + 1, 2 * M])
def test_activations_of_another_width(
    make: Callable[..., Dictionary], call: Callable[[Matrix, Tensor], object], width: int
) -> None:
    with pytest.raises(ValueError, match=f"activations have width {width}, the dictionary has d_in = {M}"):
        call(make().matrix(), normal(4, width))


@kinds
@pytest.mark.parametrize("k", [0, N + 1])
def test_k_out_of_range(make: Callable[..., Dictionary], k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be between 1 and d_sae = {N}, got {k}|capacity must be at least 1"):
        make().matrix().select(normal(2, M), None, Selection(k))


@kinds
@unit
def test_gradient_of_the_parameter(make: Callable[..., Dictionary], unit_norm: bool) -> None:
    dictionary = make(unit_norm=unit_norm)
    h = normal(6, M, seed=3)

    def through_matrix(parameter: Tensor) -> Tensor:
        values = unit_rows(parameter) if unit_norm else parameter
        matrix = ExpanderMatrix(MASK.rows, values, M) if make is expander else DenseMatrix(values)
        return matrix.decode(matrix.select(h, None, Selection(K)))

    assert gradcheck(through_matrix, dictionary.values)
    dictionary.matrix().decode(dictionary.matrix().select(h, None, Selection(K))).square().sum().backward()
    expected = dictionary.values.detach().clone().requires_grad_()
    through_matrix(expected).square().sum().backward()
    torch.testing.assert_close(dictionary.values.grad, expected.grad)


def test_unit_rows_and_their_gradients_are_those_of_normalize() -> None:
    values, grad = normal(9, 5, seed=1).requires_grad_(), normal(9, 5, seed=2)
    torch.testing.assert_close(unit_rows(values), torch.nn.functional.normalize(values, dim=1))
    (found,) = torch.autograd.grad(unit_rows(values), values, grad)
    (expected,) = torch.autograd.grad(torch.nn.functional.normalize(values, dim=1), values, grad)
    torch.testing.assert_close(found, expected)
    assert gradcheck(unit_rows, values)
    assert gradgradcheck(unit_rows, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_zero_column_stays_zero_at_unit_norm(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=dtype)
    expected = torch.tensor([[0.0, 0.0], [0.6, 0.8]], dtype=dtype)
    assert torch.equal(unit_rows(values), expected)


def test_columns_start_at_random_directions_given_by_the_generator() -> None:
    def start(seed: int) -> Tensor:
        return ExpanderDictionary(MASK, generator=torch.Generator().manual_seed(seed)).values.detach()

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))
    weight = DenseDictionary.random(M, N, generator=torch.Generator().manual_seed(3)).values
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d_in", "size"), [(8, 1), (256, 1), (257, 2), (65536, 2), (65537, 4)])
def test_storage_counts(dtype: torch.dtype, d_in: int, size: int) -> None:
    drawn = Mask.build("left-regular", d_in=d_in, d_sae=5, degree=3)
    for mask, support_bytes in ((drawn, 0), (Mask.from_rows(drawn.rows, d_in), 5 * 3 * size)):
        dictionary = ExpanderDictionary(mask).to(dtype)
        assert dictionary.num_values == 15
        assert dictionary.support_bytes == support_bytes
        assert dictionary.num_bytes == 15 * dtype.itemsize + support_bytes
        stored = dictionary.stored_tensors()
        assert sum(t.numel() * t.element_size() for t in stored.values()) == dictionary.num_bytes
        if "rows" in stored:
            assert stored["rows"].to(torch.int64).tolist() == mask.rows.tolist()
    assert smallest_unsigned(d_in).itemsize == size


def test_dense_storage() -> None:
    dictionary = dense()
    assert (dictionary.num_values, dictionary.num_bytes, dictionary.support_bytes) == (M * N, M * N * 8, 0)


@kinds
def test_point_at(make: Callable[..., Dictionary]) -> None:
    dictionary = make(unit_norm=False)
    before = dictionary.values.detach().clone()
    features, targets = torch.tensor([3, 9, 5]), normal(3, M, seed=5) * 100
    targets[2] = 0  # vanishes on every support
    dictionary.point_at(features, targets)
    w = dictionary.to_dense()
    mask = MASK.to_dense() if make is expander else torch.ones(M, N, dtype=torch.bool)
    for j, target in list(zip(features, targets, strict=True))[:2]:
        aimed = target * mask[:, j]
        torch.testing.assert_close(w[:, j], aimed / aimed.norm())
    untouched = [j for j in range(N) if j not in (3, 9)]
    assert torch.equal(dictionary.values[untouched], before[untouched])


@kinds
@unit
@pytest.mark.parametrize("learned", [False, True], ids=["recipe", "learned rows"])
def test_rebuilt_from_config_and_tensors(make: Callable[..., Dictionary], unit_norm: bool, learned: bool) -> None:
    if learned:
        dictionary: Dictionary = ExpanderDictionary(Mask.from_rows(MASK.rows, M), normal(N, D), unit_norm=unit_norm)
    else:
        dictionary = make(unit_norm=unit_norm)
    again = dictionary_from(Section(dictionary.config(), "dictionary"), dictionary.stored_tensors(), M, N)
    assert type(again) is type(dictionary)
    assert again.config() == dictionary.config()
    assert torch.equal(again.to_dense(), dictionary.to_dense())
    assert again.num_bytes == dictionary.num_bytes
    assert again.values.requires_grad


def rebuilt(dictionary: Dictionary, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Dictionary:
    tensors = dictionary.stored_tensors() if tensors is None else tensors
    return dictionary_from(Section(dictionary.config() | changes, "dictionary"), tensors, M, N)


@pytest.mark.parametrize(
    ("make", "changes", "tensors", "message"),
    [
        (expander, {"kind": "low-rank"}, None, "unknown dictionary kind 'low-rank'.*a newer expander-sae may know it"),
        (expander, {"version": 2}, None, "dictionary has version 2, this program reads version 1"),
        (expander, {}, {}, "the tensor 'values' is missing"),
        (dense, {}, {}, "the tensor 'values' is missing"),
        (expander, {}, {"values": torch.zeros(N, D + 1)}, "'values' should be floating point of shape"),
        (dense, {}, {"values": torch.zeros(N)}, "'values' should be floating point of shape"),
        (dense, {}, {"values": torch.full((N, M), torch.inf)}, "'values' holds NaN or infinity"),
        (
            expander,
            {"mask": {"kind": "explicit", "version": 1, "d_in": M, "d_sae": N, "degree": D, "sha256": ""}},
            None,
            "the tensor 'rows' is missing",
        ),
    ],
)
def test_what_cannot_be_rebuilt(
    make: Callable[..., Dictionary], changes: dict[str, Any], tensors: dict[str, Tensor] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rebuilt(make(), tensors, **changes)


def test_another_mask_is_refused_with_both_hashes() -> None:
    config = expander().config()["mask"] | {"seed": 5}
    other = Mask.build(config["kind"], d_in=M, d_sae=N, degree=D, seed=5)
    with pytest.raises(ValueError, match="the mask does not match") as caught:
        rebuilt(expander(), mask=config)
    assert MASK.sha256 in str(caught.value)
    assert other.sha256 in str(caught.value)


def test_learned_rows_that_were_changed_are_refused() -> None:
    dictionary = ExpanderDictionary(Mask.from_rows(MASK.rows, M))
    tensors = dictionary.stored_tensors()
    rows = tensors["rows"].to(torch.int64)
    rows[0] = torch.tensor([0, 1, 2]) if rows[0].tolist() != [0, 1, 2] else torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match="the mask does not match"):
        rebuilt(dictionary, tensors | {"rows": rows.to(torch.uint8)})


def test_pointing_at_a_smaller_norm_gives_the_same_columns() -> None:
    one, other = expander(), expander()
    targets = normal(2, M, seed=3)
    one.point_at(torch.tensor([1, 4]), targets)
    other.point_at(torch.tensor([1, 4]), targets, norm=0.25)
    torch.testing.assert_close(other.to_dense(), one.to_dense())
    torch.testing.assert_close(other.values[[1, 4]].norm(dim=1), torch.full((2,), 0.25, dtype=torch.float64))


def test_a_matrix_from_entries_in_any_order() -> None:
    matrix = expander().matrix().detach()
    order = torch.tensor([2, 0, 1])
    again = ExpanderMatrix.from_entries(matrix.rows[:, order], matrix.values[:, order], M)
    assert torch.equal(again.to_dense(), matrix.to_dense())
    assert matrix.matrix() is matrix


def test_codes_may_name_a_feature_twice() -> None:
    matrix = expander().matrix()
    code = SparseCode(torch.tensor([[2, 2]], dtype=torch.int32), torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(matrix.decode(code), 3 * matrix.to_dense()[:, 2].unsqueeze(0))


def test_repr_names_mask_and_norm() -> None:
    assert "degree=3, left-regular, seed 2), unit_norm=True" in repr(expander())
    assert "d_in=8, d_sae=13, unit_norm=False" in repr(dense(unit_norm=False))
