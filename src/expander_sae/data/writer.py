"""Writing a store, or going on with one that a kill left unfinished."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from expander_sae.data.manifest import (
    DTYPES,
    MANIFEST,
    Manifest,
    Shard,
    StoreError,
    StoreMeta,
    planned_bytes,
    shard_label,
    shard_name,
)
from expander_sae.data.sources import count_not_finite
from expander_sae.data.store import open_shard
from expander_sae.files import atomic_path, folder_lock, remove_leftovers, require_free_space, sha256_file, user_path


class StoreWriter:
    """Writes a store, or goes on with one that a kill left unfinished.

    ``expected_rows``: rows of the whole store; that the disk has room for the missing ones is checked here.
    A shard is written by the ``append`` that brings at least ``shard_rows`` rows together and holds them all:
    shards end where appends end, so ``cursor`` always fits the rows on disk.

    As a context manager it calls ``close`` at the end. Ctrl-C keeps all rows appended so far, any other
    exception those in finished shards; either way the store stays unfinished and can be resumed.

    The folder is locked from here to the end of ``close`` (or of the ``with`` block, or of the process, however
    it ends): a second writer of the same folder gets ``files.FolderInUse``, which names the first, at once.

    Raises ``StoreError`` if the folder holds a finished store, one whose ``meta`` differs (the fields are
    named) or damaged shards; ``OSError`` if the disk has too little room.
    """

    def __init__(self, folder: str | Path, meta: StoreMeta, *, expected_rows: int, shard_rows: int = 16384) -> None:
        if expected_rows < 1 or shard_rows < 1:
            raise ValueError(f"expected_rows and shard_rows must be at least 1 (got {expected_rows}, {shard_rows})")
        self.folder = user_path(folder)
        self.shard_rows = shard_rows
        self._pending: list[_Append] = []
        if not self.folder.exists():  # too large a request leaves no folder
            self._require_room(meta, expected_rows)
        self._lock = folder_lock(self.folder, "an activation store is written")
        try:
            if (self.folder / MANIFEST).exists():
                self.manifest = self._resume(meta)
            elif any(self.folder.glob("shard-*.safetensors")):
                raise StoreError(f"{folder} has shards but no {MANIFEST}. Choose another folder, or delete this one.")
            else:
                self.manifest = Manifest(meta)
            self._require_room(meta, expected_rows - self.manifest.num_rows)
            self._remove_leftovers()
            self.manifest.write(self.folder)
        except BaseException:
            self._lock.release()
            raise

    def _require_room(self, meta: StoreMeta, rows: int) -> None:
        needed = planned_bytes(max(rows, 0), meta.d_in, meta.dtype)
        require_free_space(self.folder, needed, "The activation store")

    @property
    def cursor(self) -> Any:
        """The ``cursor`` of the last append that is on disk; None in a new store."""
        return self.manifest.cursor

    @property
    def num_rows(self) -> int:
        """Rows on disk and rows waiting for the next shard."""
        return self.manifest.num_rows + self._num_pending

    def append(
        self,
        rows: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        *,
        cursor: Any,
        left_out_by_position: int = 0,
        left_out_by_norm: int = 0,
    ) -> None:
        """Add ``rows`` ``(b, d_in)``, ``b >= 0``, with their ``tokens`` and ``positions`` ``(b,)``.

        Rows are converted to the store's dtype. ``cursor`` is any JSON value that says where to go on after
        these rows; the two counts are the tokens left out since the last append.

        Raises ``StoreError`` for integer rows, a wrong shape, NaN or infinity; nothing is then added.
        """
        meta = self.manifest.meta
        if self.manifest.complete:
            raise StoreError(f"{self.folder} is finished: nothing can be appended")
        if not rows.is_floating_point():
            raise StoreError(f"activations must be floating-point, not {rows.dtype}")
        if rows.ndim != 2 or rows.shape[1] != meta.d_in:
            raise StoreError(f"activations must have shape (b, {meta.d_in}), not {tuple(rows.shape)}")
        for name, labels in (("tokens", tokens), ("positions", positions)):
            if labels.shape != rows.shape[:1] or labels.is_floating_point():
                given = f"{labels.dtype} {tuple(labels.shape)}"
                raise StoreError(f"{name} must be integers of shape ({rows.shape[0]},), not {given}")
        stored = rows.detach().to("cpu", DTYPES[meta.dtype], copy=True)  # the caller may reuse its buffer
        if bad := count_not_finite(stored):
            raise StoreError(f"{bad} of {len(stored)} activation rows hold NaN or infinity in {meta.dtype}")
        self._pending.append(
            _Append(
                stored,
                tokens.detach().to("cpu", torch.int32, copy=True),
                positions.detach().to("cpu", torch.int32, copy=True),
                json.loads(json.dumps(cursor, allow_nan=False)),  # a copy; what is no JSON fails here
                left_out_by_position,
                left_out_by_norm,
            )
        )
        if self._num_pending >= self.shard_rows:
            self.commit()

    def commit(self) -> None:
        """Write the waiting rows as a shard, then the manifest that lists it."""
        if not self._pending:
            return
        shards = self.manifest.shards
        if self._num_pending:
            shards = (*shards, self._write_shard(len(shards)))
        by_position = self.manifest.left_out_by_position + sum(a.by_position for a in self._pending)
        by_norm = self.manifest.left_out_by_norm + sum(a.by_norm for a in self._pending)
        manifest = replace(
            self.manifest,
            shards=shards,
            left_out_by_position=by_position,
            left_out_by_norm=by_norm,
            cursor=self._pending[-1].cursor,
        )
        manifest.write(self.folder)
        # Interrupted before this line, a second commit writes the same shard and the same manifest again.
        self.manifest, self._pending = manifest, []

    def close(self) -> None:
        """Write what is waiting, mark the store complete, unlock the folder. ``StoreError`` if it has no row."""
        self.commit()
        if not self.manifest.shards:
            raise StoreError(f"no activations were written to {self.folder}: the text gave no rows to keep")
        if not self.manifest.complete:
            manifest = replace(self.manifest, complete=True)
            manifest.write(self.folder)
            self.manifest = manifest
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
            elif issubclass(kind, KeyboardInterrupt):
                self.commit()
        finally:
            self._lock.release()

    @property
    def _num_pending(self) -> int:
        return sum(len(append.tokens) for append in self._pending)

    def _resume(self, meta: StoreMeta) -> Manifest:
        manifest = Manifest.read(self.folder)
        if differences := manifest.meta.differences(meta):
            raise StoreError(
                f"{self.folder} holds a store made with other settings ({'; '.join(differences)}). "
                "Choose another folder, or use the same settings to go on with it."
            )
        if manifest.complete:
            raise StoreError(f"{self.folder} holds a finished store: open it, or choose another folder.")
        for number in range(len(manifest.shards)):
            open_shard(self.folder, manifest, number, sha256=False)
        return manifest

    def _remove_leftovers(self) -> None:
        """Remove what a killed writer left: temporary folders, and a shard that no manifest lists yet."""
        remove_leftovers(self.folder, locked=True)
        listed = {shard.file for shard in self.manifest.shards}
        for path in self.folder.glob("shard-*.safetensors"):
            if path.name not in listed:
                path.unlink()

    def _write_shard(self, number: int) -> Shard:
        name = shard_name(number)
        tensors = {
            "acts": torch.cat([append.rows for append in self._pending]),
            "tokens": torch.cat([append.tokens for append in self._pending]),
            "positions": torch.cat([append.positions for append in self._pending]),
        }
        with atomic_path(self.folder / name) as temporary:
            try:
                save_file(tensors, temporary, metadata=shard_label(self.manifest.meta, number))
            except SafetensorError as error:  # it wraps the operating system's errors
                raise OSError(f"could not write {self.folder / name}: {error}") from error
            return Shard(name, len(tensors["tokens"]), temporary.stat().st_size, sha256_file(temporary))


@dataclass(frozen=True)
class _Append:
    """One append waiting for its shard; one object, so that Ctrl-C cannot part rows from their cursor."""

    rows: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    cursor: Any
    by_position: int
    by_norm: int
