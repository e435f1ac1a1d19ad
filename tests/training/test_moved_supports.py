"""Supports that move while a dictionary is trained: the checkpoint has them, and resuming is the same bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load, save

from expander_sae.data import TensorSource
from expander_sae.mask import Mask
from expander_sae.sae import SAE
from expander_sae.training import TrainConfig, Trainer

M, N, D = 8, 20, 3
CONFIG = TrainConfig(steps=40, batch_size=32, lr=1e-2, resample_every=15, b_dec_init="mean")


def make() -> tuple[SAE, Trainer]:
    h = torch.randn(300, M, generator=torch.Generator().manual_seed(0))
    sae = SAE.expander(Mask.build("balanced", d_in=M, d_sae=N, degree=D, seed=2), 3, untied=True)
    return sae, Trainer(sae, TensorSource(h), CONFIG)


def move(sae: SAE) -> None:
    features = torch.tensor([1, 7, 11])
    generator = torch.Generator().manual_seed(5)
    rows = torch.rand(3, M, generator=generator).topk(D, dim=1).indices
    sae.dictionary.move(features, rows, torch.randn(3, D, generator=generator))  # type: ignore[union-attr]


def steps(trainer: Trainer, first: int, last: int) -> None:
    for step in range(first, last):
        trainer.step(step)


def test_a_checkpoint_brings_moved_supports_along(tmp_path: Path) -> None:
    sae, whole = make()
    whole.initialise()
    steps(whole, 0, 20)
    move(sae)
    tensors, numbers = whole.state()
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})  # as a checkpoint keeps them
    kept = json.dumps(numbers)
    steps(whole, 20, 40)
    whole.finish()

    other, resumed = make()
    before = other.dictionary.mask  # type: ignore[union-attr]
    assert resumed.restore((load(data), json.loads(kept))) == 20
    steps(resumed, 20, 40)
    resumed.finish()
    assert other.dictionary.recipe is None  # type: ignore[union-attr]
    assert before.sha256 == make()[0].dictionary.mask.sha256  # type: ignore[union-attr]
    for name, tensor in sae.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    sae.save_pretrained(tmp_path)
    assert torch.equal(SAE.from_pretrained(tmp_path).dictionary.to_dense(), other.dictionary.to_dense())
