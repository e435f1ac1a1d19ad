"""Activations on disk: a folder written shard by shard, resumable, checked when opened, read as memory maps.

The folder holds ``manifest.json`` and shards ``shard-00000.safetensors``, … of flat rows: ``acts``
``(rows, d_in)`` in the store's dtype, ``tokens`` and ``positions`` ``(rows,)`` int32. A shard is whole before
the manifest lists it, so a kill costs the rows of one shard at most. Each shard carries its number and the
fingerprint of the run that wrote it, so that a file from elsewhere is found without reading all of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from expander_sae.data.sources import ActivationSource, RowIndex, count_not_finite, row_numbers
from expander_sae.data.sources import (
    TensorSource as TensorSource,  # the store's sibling in memory, importable from here too
)
from expander_sae.files import atomic_path, atomic_write_json, require_free_space, sha256_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_AGAIN = "Restore it from a copy, or delete the folder and harvest again."


class StoreError(ValueError):
    """A store that cannot be used as asked; the message names the file or field and what to do."""


@dataclass(frozen=True)
class StoreMeta:
    """What determines a store's rows. A harvest resumes only where every field is the same.

    ``model``, ``revision``, ``tokenizer``: which language model read the text, as the user named them.
    ``hook``, ``layer``: where it was read, e.g. ``"residual"``, the output of block ``layer`` (0-based).
    ``text``: the text source and split; ``window``: tokens a sequence.
    ``skip_positions``: positions left out of every window. ``max_norm_multiple``: rows whose norm exceeds
    this multiple of the median are left out too (None: none are).
    """

    model: str
    revision: str | None
    tokenizer: str
    hook: str
    layer: int
    d_in: int
    dtype: str
    text: str
    window: int
    skip_positions: tuple[int, ...] = (0,)
    max_norm_multiple: float | None = None

    def __post_init__(self) -> None:
        planned_bytes(1, self.d_in, self.dtype)  # refuses what cannot be stored
        object.__setattr__(self, "skip_positions", tuple(self.skip_positions))  # JSON gives a list

    def differences(self, other: StoreMeta) -> list[str]:
        """One line ``"field: mine, not theirs"`` for each field that differs."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return [f"{name}: {mine!r}, not {theirs!r}" for name, mine, theirs in pairs if mine != theirs]

    def fingerprint(self) -> str:
        """Hex SHA-256 of all fields; written into every shard."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """One shard as the manifest lists it: ``rows`` of activations in ``bytes`` bytes of ``file``."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: what the rows are, the finished shards, and where a resumed harvest goes on.

    ``left_out_by_position`` and ``left_out_by_norm`` count tokens read but not stored. ``cursor`` is the
    harvester's own JSON: its state after the last listed shard. ``complete`` is set by ``StoreWriter.close``.
    """

    meta: StoreMeta
    shards: tuple[Shard, ...] = ()
    left_out_by_position: int = 0
    left_out_by_norm: int = 0
    cursor: Any = None
    complete: bool = False

    @property
    def num_rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard.bytes for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write it atomically into ``folder``."""
        counts = {"num_rows": self.num_rows, "num_shards": len(self.shards)}
        atomic_write_json(folder / MANIFEST, {"version": FORMAT_VERSION, **counts, **asdict(self)})

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read a folder's manifest. ``StoreError`` if missing, damaged or of another format version."""
        path = Path(folder) / MANIFEST
        try:
            data = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"{folder} is not an activation store: it has no {MANIFEST}") from None
        except ValueError as error:
            raise StoreError(f"{path} is not JSON ({error}). {_AGAIN}") from None
        version = data.get("version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise StoreError(f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}. {_AGAIN}")
        try:
            known = {f.name: data[f.name] for f in fields(cls)}
            known["meta"] = StoreMeta(**known["meta"])
            known["shards"] = tuple(Shard(**shard) for shard in known["shards"])
            manifest = cls(**known)
            consistent = manifest.num_rows == data["num_rows"] and len(manifest.shards) == data["num_shards"]
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path} is damaged: {type(error).__name__}: {error}. {_AGAIN}") from None
        names = [_shard_name(i) for i in range(len(manifest.shards))]
        if not consistent or [shard.file for shard in manifest.shards] != names:
            raise StoreError(f"{path} is damaged: its counts and its list of shards disagree. {_AGAIN}")
        return manifest


def planned_bytes(rows: int, d_in: int, dtype: str) -> int:
    """Bytes that ``rows`` activations of width ``d_in`` take on disk, with token ids and positions."""
    if dtype not in DTYPES:
        raise StoreError(f"dtype {dtype!r} cannot be stored: use one of {', '.join(DTYPES)}")
    if rows < 0 or d_in < 1:
        raise StoreError(f"a store needs d_in of at least 1 and no negative rows (got {d_in}, {rows})")
    return rows * (d_in * DTYPES[dtype].itemsize + 8)


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
        shards = [_open_shard(folder, manifest, i, verify == "sha256") for i in range(len(manifest.shards))]
        return cls(folder, manifest, shards)

    @property
    def d_in(self) -> int:
        return self.manifest.meta.d_in

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.manifest.meta.dtype]

    def origin(self) -> dict[str, Any]:
        """What an SAE trained on these activations records of them: model, layer, text, how they were chosen."""
        names = ("model", "revision", "hook", "layer", "text", "window", "skip_positions", "max_norm_multiple")
        return {name: getattr(self.manifest.meta, name) for name in names} | {"rows": len(self)}

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


class StoreWriter:
    """Writes a store, or goes on with one that a kill left unfinished.

    ``expected_rows``: rows of the whole store; that the disk has room for the missing ones is checked here.
    A shard is written by the ``append`` that brings at least ``shard_rows`` rows together and holds them all:
    shards end where appends end, so ``cursor`` always fits the rows on disk.

    As a context manager it calls ``close`` at the end. Ctrl-C keeps all rows appended so far, any other
    exception those in finished shards; either way the store stays unfinished and can be resumed.

    Raises ``StoreError`` if the folder holds a finished store, one whose ``meta`` differs (the fields are
    named) or damaged shards; ``OSError`` if the disk has too little room.
    """

    def __init__(self, folder: str | Path, meta: StoreMeta, *, expected_rows: int, shard_rows: int = 16384) -> None:
        if expected_rows < 1 or shard_rows < 1:
            raise ValueError(f"expected_rows and shard_rows must be at least 1 (got {expected_rows}, {shard_rows})")
        self.folder = Path(folder)
        self.shard_rows = shard_rows
        self._pending: list[_Append] = []
        if (self.folder / MANIFEST).exists():
            self.manifest = self._resume(meta)
        elif any(self.folder.glob("shard-*.safetensors")):
            raise StoreError(f"{folder} has shards but no {MANIFEST}. Choose another folder, or delete this one.")
        else:
            self.manifest = Manifest(meta)
        missing = max(expected_rows - self.manifest.num_rows, 0)
        require_free_space(self.folder, planned_bytes(missing, meta.d_in, meta.dtype), "The activation store")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self.manifest.write(self.folder)

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
        """Write what is waiting and mark the store complete. ``StoreError`` if no row was ever appended."""
        self.commit()
        if not self.manifest.shards:
            raise StoreError(f"no activations were written to {self.folder}: the text gave no rows to keep")
        if not self.manifest.complete:
            manifest = replace(self.manifest, complete=True)
            manifest.write(self.folder)
            self.manifest = manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif issubclass(kind, KeyboardInterrupt):
            self.commit()

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
            _open_shard(self.folder, manifest, number, sha256=False)
        return manifest

    def _remove_leftovers(self) -> None:
        """Remove what a killed writer left: temporary files, and a shard that no manifest lists yet."""
        listed = {shard.file for shard in self.manifest.shards}
        for pattern in ("shard-*.safetensors", ".shard-*.tmp", f".{MANIFEST}.*.tmp"):
            for path in self.folder.glob(pattern):
                if path.name not in listed:
                    path.unlink()

    def _write_shard(self, number: int) -> Shard:
        name = _shard_name(number)
        tensors = {
            "acts": torch.cat([append.rows for append in self._pending]),
            "tokens": torch.cat([append.tokens for append in self._pending]),
            "positions": torch.cat([append.positions for append in self._pending]),
        }
        with atomic_path(self.folder / name) as temporary:
            try:
                save_file(tensors, temporary, metadata=_shard_label(self.manifest.meta, number))
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


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _shard_label(meta: StoreMeta, number: int) -> dict[str, str]:
    # One entry: safetensors writes several in no fixed order, and the same rows should be the same bytes.
    return {"store": f"{meta.fingerprint()}:{number}"}


def _open_shard(folder: Path, manifest: Manifest, number: int, sha256: bool) -> dict[str, torch.Tensor]:
    """Check shard ``number`` against the manifest and map it. ``StoreError`` naming the file otherwise."""
    shard, meta = manifest.shards[number], manifest.meta
    path = folder / shard.file
    if not path.is_file():
        raise StoreError(f"{path} is missing. {_AGAIN}")
    if (size := path.stat().st_size) != shard.bytes:
        raise StoreError(f"{path} has {size} bytes, the manifest says {shard.bytes}. {_AGAIN}")
    if sha256 and sha256_file(path) != shard.sha256:
        raise StoreError(f"{path} was altered: its SHA-256 is not the manifest's. {_AGAIN}")
    expected = {
        "acts": (_SAFETENSORS_DTYPES[meta.dtype], [shard.rows, meta.d_in]),
        "tokens": ("I32", [shard.rows]),
        "positions": ("I32", [shard.rows]),
    }
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            found = {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
            if found != expected:
                raise StoreError(f"{path} holds {found}, the manifest says {expected}. {_AGAIN}")
            if file.metadata() != _shard_label(meta, number):
                raise StoreError(f"{path} is a shard of another run (or the manifest was edited). {_AGAIN}")
            return {key: file.get_tensor(key) for key in expected}
    except SafetensorError as error:
        raise StoreError(f"{path} was altered: {error}. {_AGAIN}") from None
