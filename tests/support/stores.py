"""Toy harvests and stores: what the tests of the activation stores share."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from expander_sae.data import (
    StoreMeta,
    StoreWriter,
    TensorSource,
)

META = StoreMeta(
    model="toy",
    revision=None,
    tokenizer="toy",
    hook="residual",
    layer=3,
    d_in=6,
    dtype="bfloat16",
    text="prose",
    window=8,
    max_norm_multiple=10.0,
)
NUM_APPENDS, APPEND_ROWS = 10, 7


class Crash(Exception):
    pass


def window(number: int, meta: StoreMeta = META, rows: int = APPEND_ROWS) -> tuple[torch.Tensor, ...]:
    """What a toy harvest reads at its ``number``-th step: rows, tokens, positions."""
    acts = torch.randn(rows, meta.d_in, generator=torch.Generator().manual_seed(number))
    return acts, torch.arange(rows) + 100 * number, torch.arange(rows) + 1


def harvest(folder: Path, meta: StoreMeta = META, stop: int = NUM_APPENDS, shard_rows: int = 20) -> None:
    """A toy harvest: goes on from the cursor; 20 rows are reached by every third append."""
    with StoreWriter(folder, meta, expected_rows=NUM_APPENDS * APPEND_ROWS, shard_rows=shard_rows) as writer:
        for number in range(writer.cursor or 0, stop):
            writer.append(*window(number, meta), cursor=number + 1, left_out_by_position=1, left_out_by_norm=2)


def leave_early(folder: Path, error: type[BaseException], appends: int, shard_rows: int) -> None:
    """A harvest that ``error`` ends after some appends; the store stays unfinished."""
    with (  # noqa: PT012 (the writer must see the error)
        pytest.raises(error),
        StoreWriter(folder, META, expected_rows=70, shard_rows=shard_rows) as writer,
    ):
        for number in range(appends):
            writer.append(*window(number), cursor=number + 1)
        raise error


def everything(meta: StoreMeta = META) -> torch.Tensor:
    return torch.cat([window(number, meta)[0] for number in range(NUM_APPENDS)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Forge a manifest: its hash of itself is made to agree."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text()) | changes
    del data["sha256"]
    own_hash = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(data | {"sha256": own_hash}))


SHARD = "shard-00001.safetensors"


def flip(folder: Path, offset: int) -> None:
    """Flip a bit of the second shard."""
    data = bytearray((folder / SHARD).read_bytes())
    data[offset] ^= 1
    (folder / SHARD).write_bytes(data)


def numbered(rows: int) -> TensorSource:
    return TensorSource(torch.arange(rows, dtype=torch.float32)[:, None])


def take(source: Any, count: int, *args: int) -> list[torch.Tensor]:
    return list(itertools.islice(source.batches(*args), count))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished store of 70 rows in shards of 21, 21, 21 and 7."""
    harvest(tmp_path / "store")
    return tmp_path / "store"
