"""Small training runs: activations, SAEs and configurations that the tests of training share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expander_sae.data.sources import ActivationSource, RowIndex, TensorSource
from expander_sae.mask import Mask
from expander_sae.sae import SAE
from expander_sae.training import TrainConfig
from expander_sae.training.log import read_log

M, N, D, K, ROWS = 12, 24, 4, 3, 500
QUICK = TrainConfig(steps=30, batch_size=32, log_every=7, checkpoint_every=11, resample_every=0, lr=1e-2)
MODERN = replace(QUICK, b_dec_init="mean", scale_activations=True, aux_k=5, dead_after=100, warmup_steps=5)
PAPER = replace(QUICK, resample_every=8, resample_below=40)


def activations(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sparse combinations of hidden features on a mean, in other units than the SAE's."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, M, generator=generator, dtype=torch.float64)
    code = torch.rand(rows, N, generator=generator, dtype=torch.float64)
    code = code * (code > 0.9)
    return (5 * (code @ features) + 3 * torch.randn(M, generator=generator, dtype=torch.float64)).to(dtype)


def expander(**options: Any) -> SAE:
    return SAE.expander(Mask.build("left-regular", d_in=M, d_sae=N, degree=D, seed=1), K, **options)


def state(sae: SAE) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log without what only the clock decides."""
    lines = read_log(folder / "log.jsonl")
    for line in lines:
        assert line.pop("tokens_per_second") > 0
    return lines


class Planted(ActivationSource):
    """Activations where something happens when batch number ``at`` is read."""

    def __init__(self, at: int, event: Callable[[Tensor], Tensor | None], rows: Tensor | None = None) -> None:
        self.inner = TensorSource(activations() if rows is None else rows)
        self.at, self.event = at, event

    @property
    def d_in(self) -> int:
        return self.inner.d_in

    def __len__(self) -> int:
        return len(self.inner)

    def rows(self, index: RowIndex) -> Tensor:
        return self.inner.rows(index)

    def batches(self, batch_size: int, seed: int, start_step: int = 0):
        for number, batch in enumerate(self.inner.batches(batch_size, seed, start_step), start_step):
            changed = self.event(batch) if number == self.at else None
            yield batch if changed is None else changed


def interrupted(at: int) -> Planted:
    """Ctrl-C while batch ``at`` is read."""
    return Planted(at, lambda _batch: os.kill(os.getpid(), signal.SIGINT))
