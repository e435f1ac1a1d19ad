"""Activations on disk: a folder written shard by shard, resumable, checked when opened, read as memory maps.

The folder holds ``manifest.json`` and shards ``shard-00000.safetensors``, … of flat rows: ``acts``
``(rows, d_in)`` in the store's dtype, ``tokens`` and ``positions`` ``(rows,)`` int32. A shard is whole before
the manifest lists it, so a kill costs the rows of one shard at most. Each shard carries its number and the
fingerprint of the run that wrote it, so that a file from elsewhere is found without reading all of it.

Before the first row of a shard is given out, the SHA-256 of its bytes is compared with the manifest's: once for
each file identity (``files.known_sha256``), so that the cost is paid by the first reading after a harvest or a
copy, and not again. It is the time of one sequential reading: about a second for each gigabyte where the
processor has SHA instructions and the disk keeps up, three without; two threads hash ahead of what is read.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from expander_sae.data.manifest import AGAIN, DTYPES, SAFETENSORS_DTYPES, Manifest, StoreError, shard_label
from expander_sae.data.sources import ActivationSource, RowIndex, row_numbers
from expander_sae.files import file_identity, known_sha256, sha256_file, user_path

_HASHING_THREADS = 2  # one seldom keeps up with a disk, more only take the cores from the training


class ActivationStore(ActivationSource):
    """A store on disk, read as memory maps. Make one with ``ActivationStore.open``.

    A pickled store is the path of its folder: it is opened again where it is unpickled (in a worker of a
    ``DataLoader``, say), on the same machine or one that sees the same disk, and must still hold the same.
    """

    def __init__(self, folder: Path, manifest: Manifest, verify: Literal["size", "sha256"]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._absolute = folder.absolute()  # for another process, which may be elsewhere
        self._shards = [open_shard(folder, manifest, i, verify == "sha256") for i in range(len(manifest.shards))]
        self._verdicts = _Verdicts(folder, manifest, known=verify == "sha256")
        # The row at which each shard begins, and the end.
        self._starts = np.cumsum([0] + [shard.rows for shard in manifest.shards])

    @classmethod
    def open(
        cls, folder: str | Path, verify: Literal["size", "sha256"] = "size", allow_incomplete: bool = False
    ) -> ActivationStore:
        """Open a store for reading.

        ``verify="size"`` checks each shard's size, header, shapes and origin now, and its bytes before the first
        of its rows is read (once for each file identity, see the module); ``"sha256"`` reads every byte now.
        An altered shard that is found later raises the same ``StoreError`` from ``rows`` and all that read rows.

        Raises ``StoreError`` for a folder that is no store, another format version, a shard that is missing,
        truncated, altered or from another run, and an unfinished harvest, unless ``allow_incomplete``.
        """
        if verify not in ("size", "sha256"):
            raise ValueError(f"verify must be 'size' or 'sha256', not {verify!r}")
        folder = user_path(folder)
        manifest = Manifest.read(folder)
        if not (manifest.complete or allow_incomplete):
            raise StoreError(
                f"{folder} is unfinished: {manifest.num_rows} rows so far. Run the same harvest again to "
                "go on, or open it with allow_incomplete=True to use what is there."
            )
        return cls(folder, manifest, verify)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self._absolute), self.manifest)

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
            self._verdicts.require(int(i))
            part = slice(bounds[i], bounds[i + 1])
            local = torch.from_numpy(ascending[part] - self._starts[i])
            out.index_copy_(0, torch.from_numpy(order[part]), self._shards[i][key].index_select(0, local))
        return out


def _reopen(folder: str, manifest: Manifest) -> ActivationStore:
    store = ActivationStore.open(folder, allow_incomplete=True)
    if store.manifest != manifest:
        raise StoreError(f"{folder} is another store than the one that was pickled: open it anew.")
    return store


class _Verdicts:
    """Whether the bytes of each shard are what the manifest says; threads hash ahead of the reader."""

    def __init__(self, folder: Path, manifest: Manifest, known: bool) -> None:
        self._paths = [folder.absolute() / shard.file for shard in manifest.shards]
        self._hashes = [shard.sha256 for shard in manifest.shards]
        self._mapped = [file_identity(path)[:3] for path in self._paths]
        self._good = [known] * len(self._paths)
        self._starting = threading.Lock()
        self._process = -1  # whose threads hash: a forked child has none
        self._verdicts: list[Future[StoreError | None]] = []
        self._ahead: deque[int] = deque()  # who takes a number out gives its verdict

    def require(self, number: int) -> None:
        """Wait until shard ``number`` is known to be whole. ``StoreError`` if it is not."""
        if self._good[number]:
            return
        with self._starting:
            if self._process != os.getpid():
                self._start(first=number)
        try:
            self._ahead.remove(number)
        except ValueError:
            error = self._verdicts[number].result()
        else:
            try:
                error = _verdict(self._paths[number], self._hashes[number], self._mapped[number])
            except BaseException:  # Ctrl-C: leave it to the next reader
                self._ahead.appendleft(number)
                raise
            self._verdicts[number].set_result(error)
        if error is not None:
            raise StoreError(str(error))
        self._good[number] = True

    def _start(self, first: int) -> None:
        self._process = os.getpid()
        count = len(self._paths)
        self._verdicts = [Future() for _ in range(count)]
        self._ahead = deque((first + i) % count for i in range(count))
        weakref.finalize(self, self._ahead.clear)  # a store that nobody reads any more is not hashed on
        work = (self._ahead, self._verdicts, self._paths, self._hashes, self._mapped)
        for _ in range(_HASHING_THREADS):
            threading.Thread(target=_hash_ahead, args=work, name="hash shards", daemon=True).start()


def _hash_ahead(
    ahead: deque[int],
    verdicts: list[Future[StoreError | None]],
    paths: list[Path],
    hashes: list[str],
    mapped: list[list[int]],
) -> None:
    while True:
        try:
            number = ahead.popleft()
        except IndexError:
            return
        verdicts[number].set_result(_verdict(paths[number], hashes[number], mapped[number]))


def _verdict(path: Path, sha256: str, mapped: list[int]) -> StoreError | None:
    """What is wrong with a shard, if anything. ``mapped``: the identity of the file when it was opened."""
    try:
        if file_identity(path)[:3] != mapped:  # another file in its place; changed bytes show below
            return StoreError(f"{path} was replaced since the store was opened. Open it again.")
        # A record of hashes may be damaged itself: only the file's own bytes accuse it.
        if known_sha256(path) != sha256 and sha256_file(path) != sha256:
            return _altered(path)
    except OSError as error:
        return StoreError(f"{path} cannot be read ({error}). {AGAIN}")
    return None


def _altered(path: Path) -> StoreError:
    return StoreError(f"{path} was altered: its SHA-256 is not the manifest's. {AGAIN}")


def open_shard(folder: Path, manifest: Manifest, number: int, sha256: bool) -> dict[str, torch.Tensor]:
    """Check shard ``number`` against the manifest and map it. ``StoreError`` naming the file otherwise."""
    shard, meta = manifest.shards[number], manifest.meta
    path = folder / shard.file
    if not path.is_file():
        raise StoreError(f"{path} is missing. {AGAIN}")
    if (size := path.stat().st_size) != shard.bytes:
        raise StoreError(f"{path} has {size} bytes, the manifest says {shard.bytes}. {AGAIN}")
    if sha256 and sha256_file(path) != shard.sha256:
        raise _altered(path)
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
