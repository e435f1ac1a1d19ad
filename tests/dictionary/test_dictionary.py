"""Dictionaries: every linear-map method against the dense matrix, storage counts, unit norm, rebuilding."""

from __future__ import annotations

from collections.abc import Callable

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
from expander_sae.ops import SparseCode

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
        w = dictionary.parameter.detach().T.clone()
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
    code = matrix.topk(h, bias, K)
    expected = (z + bias).topk(K, dim=-1)
    assert code.indices.tolist() == expected.indices.tolist()
    close(code.values.detach(), expected.values)
    signed = matrix.topk(h, None, K, magnitude=True)
    assert signed.indices.tolist() == z.abs().topk(K, dim=-1).indices.tolist()
    close(matrix.topk(h, bias - 1, K, relu=True).values.detach(), (expected.values - 1).clamp_min(0))
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
        lambda matrix, h: matrix.topk(h, None, 2),
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
    with pytest.raises(ValueError, match=f"k must be between 1 and d_sae = {N}, got {k}"):
        make().matrix().topk(normal(2, M), None, k)


@kinds
@unit
def test_gradient_of_the_parameter(make: Callable[..., Dictionary], unit_norm: bool) -> None:
    dictionary = make(unit_norm=unit_norm)
    h = normal(6, M, seed=3)

    def through_matrix(parameter: Tensor) -> Tensor:
        values = unit_rows(parameter) if unit_norm else parameter
        matrix = ExpanderMatrix(MASK.rows, values, M) if make is expander else DenseMatrix(values)
        return matrix.decode(matrix.topk(h, None, K))

    assert gradcheck(through_matrix, dictionary.parameter)
    dictionary.matrix().decode(dictionary.matrix().topk(h, None, K)).square().sum().backward()
    expected = dictionary.parameter.detach().clone().requires_grad_()
    through_matrix(expected).square().sum().backward()
    torch.testing.assert_close(dictionary.parameter.grad, expected.grad)


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
    weight = DenseDictionary.random(M, N, generator=torch.Generator().manual_seed(3)).weight
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
    before = dictionary.parameter.detach().clone()
    features, targets = torch.tensor([3, 9, 5]), normal(3, M, seed=5) * 100
    targets[2] = 0  # vanishes on every support
    dictionary.point_at(features, targets)
    w = dictionary.to_dense()
    mask = MASK.to_dense() if make is expander else torch.ones(M, N, dtype=torch.bool)
    for j, target in list(zip(features, targets, strict=True))[:2]:
        aimed = target * mask[:, j]
        torch.testing.assert_close(w[:, j], aimed / aimed.norm())
    untouched = [j for j in range(N) if j not in (3, 9)]
    assert torch.equal(dictionary.parameter[untouched], before[untouched])


@kinds
@unit
@pytest.mark.parametrize("learned", [False, True], ids=["recipe", "learned rows"])
def test_rebuilt_from_config_and_tensors(make: Callable[..., Dictionary], unit_norm: bool, learned: bool) -> None:
    if learned:
        dictionary: Dictionary = ExpanderDictionary(Mask.from_rows(MASK.rows, M), normal(N, D), unit_norm=unit_norm)
    else:
        dictionary = make(unit_norm=unit_norm)
    again = dictionary_from(dictionary.config(), dictionary.stored_tensors(), M)
    assert type(again) is type(dictionary)
    assert again.config() == dictionary.config()
    assert torch.equal(again.to_dense(), dictionary.to_dense())
    assert again.num_bytes == dictionary.num_bytes
    assert again.parameter.requires_grad


def config_with(**changes) -> dict:
    return expander().config() | changes


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (
            config_with(kind="low-rank"),
            {},
            "unknown dictionary kind 'low-rank'; this version knows 'expander' and 'dense'",
        ),
        (config_with(), {}, "the expander dictionary lacks 'values'"),
        ({"kind": "dense", "unit_norm": True}, {}, "the dense dictionary lacks 'weight'"),
        (config_with(), {"values": torch.zeros(N, D + 1)}, "values must have the mask's shape"),
        ({"kind": "dense", "unit_norm": True}, {"weight": torch.zeros(N)}, "weight must have shape"),
        (
            config_with(mask={"recipe": None, "sha256": ""}),
            {"values": torch.zeros(N, D)},
            "the expander dictionary lacks 'rows'",
        ),
    ],
)
def test_what_cannot_be_rebuilt(config: dict, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dictionary_from(config, tensors, M)


def test_another_mask_is_refused_with_both_hashes() -> None:
    config = expander().config()
    config["mask"]["recipe"]["seed"] += 1
    other = Mask.build(**config["mask"]["recipe"])
    with pytest.raises(ValueError, match="the mask does not match") as caught:
        dictionary_from(config, expander().stored_tensors(), M)
    assert MASK.sha256 in str(caught.value)
    assert other.sha256 in str(caught.value)


def test_learned_rows_that_were_changed_are_refused() -> None:
    dictionary = ExpanderDictionary(Mask.from_rows(MASK.rows, M))
    tensors = dictionary.stored_tensors()
    rows = tensors["rows"].to(torch.int64)
    rows[0] = torch.tensor([0, 1, 2]) if rows[0].tolist() != [0, 1, 2] else torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match="the mask does not match"):
        dictionary_from(dictionary.config(), tensors | {"rows": rows.to(torch.uint8)}, M)


def test_codes_may_name_a_feature_twice() -> None:
    matrix = expander().matrix()
    code = SparseCode(torch.tensor([[2, 2]], dtype=torch.int32), torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(matrix.decode(code), 3 * matrix.to_dense()[:, 2].unsqueeze(0))


def test_repr_names_mask_and_norm() -> None:
    assert "degree=3, left-regular, seed 2), unit_norm=True" in repr(expander())
    assert "d_in=8, d_sae=13, unit_norm=False" in repr(dense(unit_norm=False))
