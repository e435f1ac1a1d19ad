"""Activations on disk: a folder written shard by shard, resumable, checked when opened, read as memory maps.

The folder holds ``manifest.json`` and shards ``shard-00000.safetensors``, … of flat rows: ``acts``
``(rows, d_in)`` in the store's dtype, ``tokens`` and ``positions`` ``(rows,)`` int32. A shard is whole before
the manifest lists it, so a kill costs the rows of one shard at most. Each shard carries its number and the
fingerprint of the run that wrote it, so that a file from elsewhere is found without reading all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from expander_sae.data.manifest import AGAIN, DTYPES, SAFETENSORS_DTYPES, Manifest, StoreError, shard_label
from expander_sae.data.sources import ActivationSource, RowIndex, row_numbers
from expander_sae.files import sha256_file


class ActivationStore(ActivationSource):
    """A store on disk, read as memory maps. Make one with ``ActivationStore.open``."""

    def __init__(self, folder: Path, manifest: Manifest, shards: list[dict[str, torch.Tensor]]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shards = shards
        # The row at which each shard begins, and the end.
        self._starts = np.cumsum([0] + [shard.rows for shard in manifest.shards])

    @classmethod
    def open(
        cls, folder: str | Path, verify: Literal["size", "sha256"] = "size", allow_incomplete: bool = False
    ) -> ActivationStore:
        """Open a store for reading.

        ``verify="size"`` checks each shard's size, header, shapes and origin; ``"sha256"`` every byte too.
        Raises ``StoreError`` for a folder that is no store, another format version, a shard that is missing,
        truncated, altered or from another run, and an unfinished harvest, unless ``allow_incomplete``.
        """
        if verify not in ("size", "sha256"):
            raise ValueError(f"verify must be 'size' or 'sha256', not {verify!r}")
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if not (manifest.complete or allow_incomplete):
            raise StoreError(
                f"{folder} is unfinished: {manifest.num_rows} rows so far. Run the same harvest again to "
                "go on, or open it with allow_incomplete=True to use what is there."
            )
        shards = [open_shard(folder, manifest, i, verify == "sha256") for i in range(len(manifest.shards))]
        return cls(folder, manifest, shards)

    @property
    def d_in(self) -> int:
        return self.manifest.meta.d_in

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.manifest.meta.dtype]

    def origin(self) -> dict[str, Any]:
        """What an SAE trained on these activations records of them: model, layer, text, how they were chosen."""
        return self.manifest.origin() | {"rows": len(self)}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        meta = self.manifest.meta
        return f"ActivationStore({str(self.folder)!r}, {len(self)} x {self.d_in} {meta.dtype}, {meta.model})"

    def rows(self, index: RowIndex) -> torch.Tensor:
        return self._gather("acts", index)

    def tokens(self, index: RowIndex) -> torch.Tensor:
        """Token ids of the rows at ``index``, int32 ``(b,)``."""
        return self._gather("tokens", index)

    def positions(self, index: RowIndex) -> torch.Tensor:
        """Positions in their window of the rows at ``index``, int32 ``(b,)``."""
        return self._gather("positions", index)

    def _gather(self, key: str, index: RowIndex) -> torch.Tensor:
        numbers = row_numbers(index, len(self))
        order = np.argsort(numbers)  # ascending: each shard is visited once, and its file read forwards
        ascending = numbers[order]
        shape = (len(numbers), self.d_in) if key == "acts" else (len(numbers),)
        out = torch.empty(shape, dtype=self.dtype if key == "acts" else torch.int32)
        bounds = np.searchsorted(ascending, self._starts)
        for i in np.flatnonzero(np.diff(bounds)):
            part = slice(bounds[i], bounds[i + 1])
            local = torch.from_numpy(ascending[part] - self._starts[i])
            out.index_copy_(0, torch.from_numpy(order[part]), self._shards[i][key].index_select(0, local))
        return out


def open_shard(folder: Path, manifest: Manifest, number: int, sha256: bool) -> dict[str, torch.Tensor]:
    """Check shard ``number`` against the manifest and map it. ``StoreError`` naming the file otherwise."""
    shard, meta = manifest.shards[number], manifest.meta
    path = folder / shard.file
    if not path.is_file():
        raise StoreError(f"{path} is missing. {AGAIN}")
    if (size := path.stat().st_size) != shard.bytes:
        raise StoreError(f"{path} has {size} bytes, the manifest says {shard.bytes}. {AGAIN}")
    if sha256 and sha256_file(path) != shard.sha256:
        raise StoreError(f"{path} was altered: its SHA-256 is not the manifest's. {AGAIN}")
    expected = {
        "acts": (SAFETENSORS_DTYPES[meta.dtype], [shard.rows, meta.d_in]),
        "tokens": ("I32", [shard.rows]),
        "positions": ("I32", [shard.rows]),
    }
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            found = {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
            if found != expected:
                raise StoreError(f"{path} holds {found}, the manifest says {expected}. {AGAIN}")
            if file.metadata() != shard_label(meta, number):
                raise StoreError(f"{path} is a shard of another run (or the manifest was edited). {AGAIN}")
            return {key: file.get_tensor(key) for key in expected}
    except SafetensorError as error:
        raise StoreError(f"{path} was altered: {error}. {AGAIN}") from None
