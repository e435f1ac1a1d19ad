"""Sparsity rules: what they select, what a code of varying counts looks like, and that a new rule is one class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Self

import numpy as np
import pytest
import torch
from torch import Tensor

from expander_sae.data import TensorSource
from expander_sae.mask import Mask
from expander_sae.ops import Selection, SparseCode
from expander_sae.sae import SAE, SPARSITIES, BatchTopK, Sparsity, TopK
from expander_sae.stored import Section
from expander_sae.training import TrainConfig, train

M, N, K = 8, 20, 3
MASK = Mask.build("balanced", d_in=M, d_sae=N, degree=3, seed=2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sae_with(rule: Sparsity) -> SAE:
    return SAE.expander(MASK, K, sparsity=rule)


def shy(sae: SAE) -> SAE:
    with torch.no_grad():
        sae.encoder.b_enc -= 0.8  # few scores are positive then
    return sae


def test_topk_and_its_variants() -> None:
    h, sae = normal(50, M), sae_with(TopK(N, K))
    z = h @ sae.dictionary.to_dense()
    assert torch.equal(sae.encode(h).indices, z.topk(K, dim=1).indices.int())
    assert sae.signed
    positive = shy(sae_with(TopK(N, K, relu=True)))
    code = positive.encode(h)
    torch.testing.assert_close(code.values.detach(), (z.topk(K, dim=1).values - 0.8).relu())
    empty = code.values == 0
    assert 0 < int(empty.sum()) < empty.numel()
    assert (code.indices[empty] == 0).all()
    assert not positive.signed
    largest = sae_with(TopK(N, K, rank="magnitude")).encode(h)
    assert torch.equal(largest.indices, z.abs().topk(K, dim=1).indices.int())
    assert (largest.values < 0).any()


@pytest.mark.parametrize("k", [0, -3, N + 1])
def test_k_out_of_range(k: int) -> None:
    for kind in SPARSITIES.values():
        with pytest.raises(ValueError, match=f"k must be between 1 and d_sae = {N}, got {k}"):
            kind(N, k)


def test_k_is_an_integer_and_stays_json() -> None:
    assert json.dumps(TopK(N, np.int64(3)).config())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="integer"):
        TopK(N, 3.0)  # type: ignore[arg-type]


def test_options_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="choose one"):
        TopK(N, K, relu=True, rank="magnitude")
    with pytest.raises(ValueError, match="rank must be"):
        TopK(N, K, rank="loud")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="capacity must be between k = 3 and d_sae = 20, got 2"):
        BatchTopK(N, K, capacity=2)
    with pytest.raises(ValueError, match="momentum"):
        BatchTopK(N, K, momentum=1.0)


def test_batch_topk_takes_k_per_sample_on_average() -> None:
    rule = BatchTopK(N, K)
    sae, h = sae_with(rule), normal(64, M) * torch.linspace(0.1, 3, 64).unsqueeze(1)
    code = sae.encode(h)
    counts = (code.values != 0).sum(dim=1)
    assert int(counts.sum()) == 64 * K
    assert counts.min() < K < counts.max() <= rule.capacity
    z = (h @ sae.dictionary.to_dense()).relu()
    edge = z.flatten().topk(64 * K).values[-1]
    torch.testing.assert_close(code.to_dense(N).detach(), torch.where(z >= edge, z, 0.0))


def test_batch_topk_learns_a_threshold_for_single_samples() -> None:
    rule = BatchTopK(N, K, momentum=0.5)
    sae = sae_with(rule)
    for seed in range(20):
        rule.after_step(sae.encode(normal(64, M, seed=seed)))
    assert rule.threshold > 0
    sae.eval()
    h = normal(500, M, seed=99)
    code = sae.encode(h)
    assert (code.values[code.values != 0] > rule.threshold).all()
    assert abs(float((code.values != 0).sum(dim=1).double().mean()) - K) < 0.5
    alone = [sae.encode(one.unsqueeze(0)).to_dense(N) for one in h[:20]]
    torch.testing.assert_close(torch.cat(alone), code.to_dense(N)[:20])
    before = sae.encode(h * 3).to_dense(N)
    sae.rescale_(3.0)
    torch.testing.assert_close(sae.encode(h).to_dense(N), before / 3)


def test_batch_topk_through_the_one_loop_and_a_folder(tmp_path) -> None:
    for options in ({}, {"aux_k": 2, "dead_after": 50, "scale_activations": True, "b_dec_init": "mean"}):
        sae = sae_with(BatchTopK(N, K))
        source = TensorSource(normal(600, M))
        before = float(sae.squared_error(normal(200, M)).error)
        train(sae, source, TrainConfig(steps=60, batch_size=64, lr=1e-2, **options))  # type: ignore[arg-type]
        assert float(sae.squared_error(normal(200, M)).error) < before
        sae.eval()
        sae.save_pretrained(tmp_path)
        again = SAE.from_pretrained(tmp_path)
        assert again.config() == sae.config()
        assert torch.equal(again(normal(9, M)), sae(normal(9, M)))
        assert float(again.sparsity.threshold) > 0  # type: ignore[arg-type]


class Loudest(Sparsity):
    """A rule as a plug-in writes it: everything above a threshold, with a penalty, in one class."""

    kind = "loudest"

    def selection(self) -> Selection | None:
        return None if self.training else Selection(self.k, 0.5)

    def forward(self, score) -> SparseCode:
        return score(Selection(self.k, 0.5))

    @property
    def signed(self) -> bool:
        return False

    def penalty(self, code: SparseCode) -> Tensor:
        return 0.1 * code.values.abs().sum(dim=1).mean()

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], d_sae: int) -> Self:
        section.only("kind", "version", "k")
        return cls(d_sae, section.integer("k", 1, d_sae))


def test_a_new_rule_touches_one_class(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setitem(SPARSITIES, "loudest", Loudest)
    sae = sae_with(Loudest(N, 6))
    train(sae, TensorSource(normal(600, M)), TrainConfig(steps=40, batch_size=64, lr=1e-2))
    sae.save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path)
    code = again.encode(normal(40, M))
    assert (code.values[code.values != 0] > 0.5).all()
    plain = sae_with(TopK(N, 6, relu=True))
    train(plain, TensorSource(normal(600, M)), TrainConfig(steps=40, batch_size=64, lr=1e-2))
    assert float(code.values.sum()) < float(plain.encode(normal(40, M)).values.sum())  # the penalty was felt
