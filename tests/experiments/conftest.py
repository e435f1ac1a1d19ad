"""A tiny store of structured activations and a tiny language model in place of the embedded ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from support.lm import VOCAB, tiny_lm

from expander_sae.data import ActivationStore, StoreMeta, StoreWriter
from expander_sae.experiments.common.subject import Subject
from expander_sae.lm import LanguageModel
from expander_sae.mask import Mask
from expander_sae.ops import SparseCode
from expander_sae.sae import SAE

WIDTH, ROWS = 32, 600  # the width of the tiny language model


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """``(600, 32)``: sparse combinations of columns on a mask, a mean and a little noise."""
    generator = torch.Generator().manual_seed(0)
    columns = (
        SAE.expander(Mask.build("balanced", d_in=WIDTH, d_sae=40, degree=3, seed=9), 3).dictionary.matrix().detach()
    )
    features = torch.rand(ROWS, 40, generator=generator).topk(3, dim=1).indices.to(torch.int32)
    h = columns.decode(SparseCode(features, torch.randn(ROWS, 3, generator=generator)))
    h = h + 0.05 * torch.randn(h.shape, generator=generator) + torch.randn(WIDTH, generator=generator)
    meta = StoreMeta("tiny-llama", None, "toy", "residual", 1, WIDTH, "float32", "prose", 8)
    folder: Path = tmp_path_factory.mktemp("store")
    with StoreWriter(folder, meta, expected_rows=ROWS) as writer:
        writer.append(h, torch.arange(ROWS), torch.arange(ROWS), cursor=None)
    return ActivationStore.open(folder)


@dataclass(frozen=True)
class TinySubject(Subject):
    """Evaluates in the tiny language model; its activations are the structured ones, whatever the split."""

    store: ActivationStore

    @cached_property
    def lm(self) -> LanguageModel:
        return tiny_lm()

    def activations(self, tokens: int, split: str = "train") -> ActivationStore:
        return self.store

    def windows(self, count: int) -> list[torch.Tensor]:
        return list(torch.randint(2, VOCAB, (count, 12), generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="session")
def tiny_subject(tiny_store: ActivationStore) -> TinySubject:
    return TinySubject("toy", 1, "prose", tiny_store)


@pytest.fixture(autouse=True)
def studied(tiny_subject: TinySubject, monkeypatch: pytest.MonkeyPatch) -> TinySubject:
    """Every experiment studies the tiny subject."""
    monkeypatch.setattr(Subject, "of", classmethod(lambda cls, model: tiny_subject))
    return tiny_subject
