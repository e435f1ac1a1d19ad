"""``manifest.json``: what a store's rows are, its finished shards, and where a resumed harvest goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from expander_sae.files import atomic_write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
AGAIN = "Restore it from a copy, or delete the folder and harvest again."


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
            raise StoreError(f"{path} is not JSON ({error}). {AGAIN}") from None
        version = data.get("version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise StoreError(f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}. {AGAIN}")
        try:
            known = {f.name: data[f.name] for f in fields(cls)}
            known["meta"] = StoreMeta(**known["meta"])
            known["shards"] = tuple(Shard(**shard) for shard in known["shards"])
            manifest = cls(**known)
            consistent = manifest.num_rows == data["num_rows"] and len(manifest.shards) == data["num_shards"]
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path} is damaged: {type(error).__name__}: {error}. {AGAIN}") from None
        names = [shard_name(i) for i in range(len(manifest.shards))]
        if not consistent or [shard.file for shard in manifest.shards] != names:
            raise StoreError(f"{path} is damaged: its counts and its list of shards disagree. {AGAIN}")
        return manifest


def planned_bytes(rows: int, d_in: int, dtype: str) -> int:
    """Bytes that ``rows`` activations of width ``d_in`` take on disk, with token ids and positions."""
    if dtype not in DTYPES:
        raise StoreError(f"dtype {dtype!r} cannot be stored: use one of {', '.join(DTYPES)}")
    if rows < 0 or d_in < 1:
        raise StoreError(f"a store needs d_in of at least 1 and no negative rows (got {d_in}, {rows})")
    return rows * (d_in * DTYPES[dtype].itemsize + 8)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def shard_label(meta: StoreMeta, number: int) -> dict[str, str]:
    # One entry: safetensors writes several in no fixed order, and the same rows should be the same bytes.
    return {"store": f"{meta.fingerprint()}:{number}"}
