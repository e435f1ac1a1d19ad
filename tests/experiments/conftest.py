"""A tiny store of structured activations in place of the embedded model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expander_sae.data import ActivationStore, StoreMeta, StoreWriter
from expander_sae.mask import Mask
from expander_sae.ops import SparseCode
from expander_sae.sae import SAE

WIDTH, ROWS = 16, 600


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """``(600, 16)``: sparse combinations of columns on a mask, a mean and a little noise."""
    generator = torch.Generator().manual_seed(0)
    columns = (
        SAE.expander(Mask.build("balanced", d_in=WIDTH, d_sae=40, degree=3, seed=9), 3).dictionary.matrix().detach()
    )
    features = torch.rand(ROWS, 40, generator=generator).topk(3, dim=1).indices.to(torch.int32)
    h = columns.decode(SparseCode(features, torch.randn(ROWS, 3, generator=generator)))
    h = h + 0.05 * torch.randn(h.shape, generator=generator) + torch.randn(WIDTH, generator=generator)
    meta = StoreMeta("toy", None, "toy", "residual", 1, WIDTH, "float32", "prose", 8)
    folder: Path = tmp_path_factory.mktemp("store")
    with StoreWriter(folder, meta, expected_rows=ROWS) as writer:
        writer.append(h, torch.arange(ROWS), torch.arange(ROWS), cursor=None)
    return ActivationStore.open(folder)
