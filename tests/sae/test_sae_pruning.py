"""An SAE on pruned supports: what is kept, and that the one training loop retunes it."""

from __future__ import annotations

import pytest
import torch

from expander_sae.data import TensorSource
from expander_sae.dictionary import OrthogonalBasis
from expander_sae.sae import SAE, pruned
from expander_sae.training import TrainConfig, train

WIDTH, CONFIG = 8, TrainConfig(steps=30, batch_size=32, lr=0.01, resample_every=0, b_dec_init="mean")


def activations() -> TensorSource:
    return TensorSource(torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(0)) + 1)


def test_pruned_to_all_entries_it_is_the_same_sae() -> None:
    sae = SAE.dense(WIDTH, 16, k=3)
    train(sae, activations(), CONFIG)
    h = activations().rows(slice(0, 20))
    torch.testing.assert_close(pruned(sae, WIDTH)(h), sae(h))


def test_entries_are_those_in_the_basis() -> None:
    plain, turned = SAE.dense(WIDTH, 16, k=3), SAE.dense(WIDTH, 16, k=3)
    basis = OrthogonalBasis.random(WIDTH, seed=1)
    turned.enter_basis_(basis)
    h = activations().rows(slice(0, 20))
    small = pruned(turned, 3)
    assert small.dictionary.basis is not basis, "a copy"
    torch.testing.assert_close(small(h), basis.vectors(pruned(plain, 3)(basis.coordinates(h))))


def test_the_pruned_sae_is_its_own_and_is_retuned() -> None:
    source = activations()
    sae = SAE.dense(WIDTH, 16, k=3)
    train(sae, source, CONFIG)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items() if isinstance(tensor, torch.Tensor)}
    small = pruned(sae, 2)
    assert small.num_values == 32
    assert torch.equal(small.encoder.state_dict()["b_enc"], sae.encoder.state_dict()["b_enc"])
    assert torch.equal(small.b_dec, sae.b_dec)
    h = source.rows(slice(0, 400))
    error = float((small(h) - h).detach().square().sum())
    rows = small.dictionary.to_dense() != 0
    summary = train(small, source, CONFIG)
    assert float((small(h) - h).detach().square().sum()) < error
    assert torch.equal(small.dictionary.to_dense() != 0, rows), "retuning keeps the supports"
    assert summary["continues"]["steps"] == 30, "the training it comes from is counted"
    for name, tensor in before.items():
        assert torch.equal(sae.state_dict()[name], tensor), "the dense SAE is left alone"


def test_an_untied_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="untied encoder has columns of its own"):
        pruned(SAE.dense(WIDTH, 16, k=3, untied=True), 2)


def test_a_pursuit_is_kept() -> None:
    sae = pruned(SAE.dense(WIDTH, 16, k=3).with_encoder("omp", signed=True), 2)
    assert sae.encoder.config() == {"kind": "omp", "version": 1, "options": {"signed": True}}
