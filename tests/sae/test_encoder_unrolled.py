"""The unrolled matching pursuit against a dense loop that autograd differentiates itself."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expander_sae.data.sources import TensorSource
from expander_sae.dictionary import DenseDictionary, Dictionary, ExpanderDictionary
from expander_sae.mask import Mask
from expander_sae.pursuit import matching_pursuit
from expander_sae.pursuit.unrolled import unrolled_matching_pursuit
from expander_sae.sae import ENCODERS, SAE, UnrolledPursuit
from expander_sae.stored import Section
from expander_sae.training import TrainConfig, recipe, train

M, N, D, K = 8, 13, 3, 4
MASK = Mask.build("balanced", d_in=M, d_sae=N, degree=D, seed=2)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dictionary(kind: str, unit_norm: bool, seed: int = 0) -> Dictionary:
    if kind == "dense":
        return DenseDictionary(normal(N, M, seed=seed), unit_norm=unit_norm)
    return ExpanderDictionary(MASK, normal(N, D, seed=seed), unit_norm=unit_norm)


def unrolled_loop(w: Tensor, h: Tensor, k: int, nonnegative: bool, reselect: bool) -> Tensor:
    """Dense codes ``(B, n)`` by the formulas alone, ``w (m, n)``."""
    squares = w.square().sum(dim=0)
    code, residual = h.new_zeros(h.shape[0], w.shape[1]), h
    taken = torch.zeros_like(code, dtype=torch.bool)
    for _ in range(k):
        correlation = (residual @ w) / squares.sqrt()
        score = correlation if nonnegative else correlation.abs()
        score = score.detach() if reselect else score.detach().masked_fill(taken, -1.0)
        j = score.argmax(dim=1, keepdim=True)
        positive = score.gather(1, j) > 1e-12
        amount = torch.where(positive, (residual @ w / squares).gather(1, j), 0.0)
        taken = taken.scatter(1, j, True)
        code = code.scatter_add(1, j, amount)
        residual = residual - amount * w.T[j.squeeze(1)]
    return code


@pytest.mark.parametrize("kind", ["expander", "dense"])
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("reselect", [False, True])
@given(seed=st.integers(0, 1000), k=st.integers(1, 7), batch=st.integers(0, 5))
def test_codes_and_gradients_are_those_of_the_loop(
    kind: str, unit_norm: bool, nonnegative: bool, reselect: bool, seed: int, k: int, batch: int
) -> None:
    columns, weights = dictionary(kind, unit_norm, seed), normal(N, seed=5)
    h = normal(batch, M, seed=seed + 1)
    results = []
    for use_loop in (True, False):
        columns.zero_grad()
        leaf = h.clone().requires_grad_()
        matrix = columns.matrix()
        if use_loop:
            w = matrix.to_dense()
            code = unrolled_loop(w, leaf, k, nonnegative, reselect)
            decoded = code @ w.T
        else:
            sparse = unrolled_matching_pursuit(matrix, leaf, k, nonnegative=nonnegative, reselect=reselect)
            code, decoded = sparse.to_dense(N), matrix.decode(sparse)
        # A loss that depends on the coefficients themselves, not only through the reconstruction.
        ((leaf - decoded).square().sum() + (code.square() * weights).sum()).backward()
        results.append((code.detach(), leaf.grad, columns.values.grad))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_values_are_those_of_the_pursuit_in_any_shape() -> None:
    matrix = dictionary("expander", True).matrix()
    h = normal(2, 3, M, seed=7)
    code = unrolled_matching_pursuit(matrix, h, K)
    expected = matching_pursuit(h, matrix, K, refit=False)
    assert torch.equal(code.indices, expected.indices)
    torch.testing.assert_close(code.values.detach(), expected.values)
    positive = unrolled_matching_pursuit(matrix, h, K, nonnegative=True)
    assert bool((positive.values >= 0).all())


def test_a_feature_taken_twice_fills_one_slot() -> None:
    # Two columns at 45 degrees: the pursuit takes the second, the first, and the second again.
    matrix = DenseDictionary(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).matrix()
    h = torch.tensor([[1.0, 0.9]])
    code = unrolled_matching_pursuit(matrix, h, 2, reselect=True)
    longer = unrolled_matching_pursuit(matrix.subset(torch.tensor([0, 1, 1])), h, 3, reselect=True)
    assert code.indices.tolist() == [[1, 0]]
    assert longer.indices.tolist() == [[1, 0, 0]]
    assert longer.values[0, 2] == 0
    assert float(longer.values[0, 0].detach()) == pytest.approx(0.95 * 2**0.5 - 0.05 / 2**0.5)


def test_nothing_to_explain() -> None:
    matrix = dictionary("expander", True).matrix()
    h = torch.zeros(2, M, dtype=torch.float64, requires_grad=True)
    for reselect in (False, True):
        code = unrolled_matching_pursuit(matrix, h, K, reselect=reselect)
        assert not bool(code.values.any())
        assert not bool(code.indices.any())
        (gradient,) = torch.autograd.grad(code.values.sum(), h, retain_graph=True)
        assert not bool(gradient.any())


def test_a_zero_column_gets_no_gradient_and_no_nan() -> None:
    values = normal(N, D)
    values[0] = 0
    columns = ExpanderDictionary(MASK, values, unit_norm=False)
    for reselect in (False, True):
        columns.zero_grad()
        code = unrolled_matching_pursuit(columns.matrix(), normal(6, M, seed=3), K, reselect=reselect)
        code.values.sum().backward()
        assert bool(columns.values.grad.isfinite().all())
        assert not bool(columns.values.grad[0].any())


def test_saved_memory_does_not_grow_with_the_dictionary() -> None:
    """Between forward and backward nothing of size ``B x n`` or ``k x B x m`` is kept."""
    mask = Mask.build("left-regular", d_in=32, d_sae=2000, degree=3)
    columns, h = ExpanderDictionary(mask), torch.randn(50, 32)
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        unrolled_matching_pursuit(columns.matrix(), h, 16)
    assert max(sizes) <= 2000 * 3


def test_the_encoder_by_name() -> None:
    sae = SAE.expander(MASK, K).with_encoder("mp-unrolled", nonnegative=True)
    assert isinstance(sae.encoder, UnrolledPursuit)
    section = Section(json.loads(json.dumps(sae.encoder.config())), "encoder")
    again = section.kind(ENCODERS).from_config(section, {}, sae.dictionary)
    assert isinstance(again, UnrolledPursuit)
    assert again.config() == sae.encoder.config()
    assert bool((sae.encode(normal(5, M, dtype=torch.float32)).values >= 0).all())
    with pytest.raises(ValueError, match="'mp-unrolled' has no option 'refit'; it takes 'nonnegative', 'reselect'"):
        sae.with_encoder("mp-unrolled", refit=True)
    with pytest.raises(ValueError, match="k must be between 1"):
        sae.with_encoder("mp-unrolled", k=0)


def test_trained_by_the_one_loop() -> None:
    settings = {"preset": "pursuit", "encoder": "mp-unrolled", "encoder_options": {"nonnegative": True}}
    settings |= {"d_sae": 24, "degree": 3, "k": 3}
    made = recipe.resolve(settings)
    sae = made.sae.build(M)
    source = TensorSource(normal(512, M, seed=3, dtype=torch.float32) @ normal(M, M, seed=4, dtype=torch.float32))
    before = sae.dictionary.values.detach().clone()
    h = source.rows(slice(None))
    error = float((h - sae(h)).square().mean().detach())
    options = {"b_dec_init": "mean", "scale_activations": True, "resample_every": 0}
    train(sae, source, TrainConfig(steps=80, batch_size=128, lr=1e-2, **options))
    assert not torch.equal(before, sae.dictionary.values)
    assert float((h - sae(h)).square().mean().detach()) < 0.8 * error
    with pytest.raises(ValueError, match="set aux_k=0"):
        train(sae, source, TrainConfig(steps=1, batch_size=8, aux_k=4))
    with pytest.raises(ValueError, match="'mp-unrolled' has no option 'block'"):
        recipe.resolve(settings, {"encoder_options": {"block": 8}})
