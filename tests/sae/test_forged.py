"""Forged folders, hashes made to agree: each loads as what it says or is refused by name, not from five layers down."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expander_sae.mask import Mask
from expander_sae.sae import SAE, BatchTopK, SAEFolderError
from expander_sae.sae.folder import CONFIG_NAME, TENSORS_NAME

M, N = 8, 13
MASK = Mask.build("balanced", d_in=M, d_sae=N, degree=3, seed=2)
UNEVEN = Mask.build("bernoulli", d_in=M, d_sae=N, degree=2, seed=2)
ODD: list[Any] = [None, True, -1, 0, 1, 2**70, 1.5, "", "paper", [], [1], {}, {"kind": "dense"}, 10**9]

SAES = {
    "tied": lambda: SAE.expander(MASK, 4),
    "untied, learned supports": lambda: SAE.expander(Mask.from_rows(MASK.rows, M), 4, untied=True),
    "columns of different degrees": lambda: SAE.expander(UNEVEN, 4),
    "those, stored": lambda: SAE.expander(Mask.from_rows(UNEVEN.rows, M, UNEVEN.held), 4),
    "dense, batch-topk": lambda: SAE.dense(M, N, k=4, sparsity=BatchTopK(N, 4)),
    "pursuit": lambda: SAE.expander(MASK, 4).with_encoder("omp", block=2),
}


def places(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        if path or key not in ("config_sha256", "files", "metadata", "format"):
            yield (*path, key)
            if isinstance(value, dict):
                yield from places(value, (*path, key))


def forge(folder: Path, config: dict[str, Any]) -> None:
    data = (folder / TENSORS_NAME).read_bytes()
    body = {key: value for key, value in config.items() if key != "config_sha256"}
    if isinstance(body.get("files"), dict):
        body["files"] = {TENSORS_NAME: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / CONFIG_NAME).write_text(json.dumps(body | {"config_sha256": digest}))


def loads_or_is_refused(folder: Path) -> bool:
    try:
        sae = SAE.from_pretrained(folder)
    except SAEFolderError as error:
        return not str(error).startswith(str(folder))  # which would be no name
    try:
        assert torch.isfinite(sae(torch.zeros(2, sae.d_in))).all()
    except ValueError as error:  # a number that a solver's option does not take
        return "block" not in str(error)
    return True


@pytest.mark.parametrize("kind", SAES)
def test_every_entry_changed_to_every_odd_value(kind: str, tmp_path: Path) -> None:
    SAES[kind]().save_pretrained(tmp_path)
    whole = json.loads((tmp_path / CONFIG_NAME).read_text())
    refused = 0
    for path in places(whole):
        for value in [*ODD, "removed"]:
            config = copy.deepcopy(whole)
            section = config
            for key in path[:-1]:
                section = section[key]
            if value == "removed":
                del section[path[-1]]
            else:
                section[path[-1]] = value
            forge(tmp_path, config)
            refused += not loads_or_is_refused(tmp_path)
    assert refused > 200


@pytest.mark.parametrize("kind", SAES)
def test_every_tensor_changed_to_every_odd_one(kind: str, tmp_path: Path) -> None:
    SAES[kind]().save_pretrained(tmp_path)
    whole = json.loads((tmp_path / CONFIG_NAME).read_text())
    tensors = load_file(tmp_path / TENSORS_NAME)
    for name, tensor in tensors.items():
        odd = [
            tensor.flatten(),
            tensor[:0],
            tensor.to(torch.int64),
            torch.full(tensor.shape, torch.nan),
            torch.full(tensor.shape, torch.inf),
            tensor.bool(),
            tensor.unsqueeze(0),
            torch.zeros(()),
        ]
        for changed in odd:
            if changed.shape == tensor.shape and changed.dtype == tensor.dtype and torch.equal(changed, tensor):
                continue
            save_file(tensors | {name: changed.contiguous()}, tmp_path / TENSORS_NAME)
            forge(tmp_path, whole)
            if not (name == "rows" and changed.dtype == torch.int64):  # the same supports in a wider type are the same
                assert not loads_or_is_refused(tmp_path), (name, changed.dtype, changed.shape)
