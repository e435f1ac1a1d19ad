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

    ``model``: the Hub id or the absolute path of a folder; ``revision``: the commit, or a fingerprint of the
    folder's weights; ``weights``: that fingerprint for a Hub model too, so that a copy of it is recognised.
    ``tokenizer``: its class; ``tokenizer_hash``: of its vocabulary and special tokens.
    ``hook``, ``layer``: where it was read: ``"residual"`` (the output of block ``layer``, 0-based),
    ``"attention"`` or ``"mlp"`` (what that part of the block gave).
    ``text``: the text source and split; ``window``: tokens a sequence. ``bos``: every window begins with BOS.
    ``concatenate``: documents run on from one window into the next; else each window is the beginning of one.
    ``skip_positions``: positions left out of every window. ``skip_special``: so are special tokens.
    ``max_norm_multiple``: rows whose norm exceeds this multiple of the median are left out too (None: none are);
    ``norm_median``, ``norm_limit``: that median over the first 4,096 positions read, and their product. These two
    are found, not asked for: they are no part of what is compared.
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
    weights: str | None = None
    tokenizer_hash: str | None = None
    bos: bool = False
    concatenate: bool = True
    skip_special: bool = False
    norm_median: float | None = None
    norm_limit: float | None = None

    def __post_init__(self) -> None:
        planned_bytes(1, self.d_in, self.dtype)  # refuses what cannot be stored
        object.__setattr__(self, "skip_positions", tuple(self.skip_positions))  # JSON gives a list

    def differences(self, other: StoreMeta) -> list[str]:
        """One line ``"field: mine, not theirs"`` for each field that differs.

        A hash that one side does not know is no difference; two revisions of the same weights are none either.
        """
        same_weights = self.weights is not None and self.weights == other.weights
        lines = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            unknown = field.name in _HASHES and None in (mine, theirs)
            if mine == theirs or unknown or field.name in _FOUND or (field.name == "revision" and same_weights):
                continue
            lines.append(f"{field.name}: {mine!r}, not {theirs!r}")
        return lines

    def fingerprint(self) -> str:
        """Hex SHA-256 of the fields; written into every shard.

        Fields that came later count where they differ from their default, the hashes and what was found never:
        shards written before stay the store's own, and the same rows stay the same bytes.
        """
        later = {"bos": False, "concatenate": True, "skip_special": False}
        values = {name: value for name, value in asdict(self).items() if name not in (*_HASHES, *_FOUND)}
        counted = {name: value for name, value in values.items() if name not in later or value != later[name]}
        return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


_HASHES = ("weights", "tokenizer_hash")
_FOUND = ("norm_median", "norm_limit")


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

    def origin(self) -> dict[str, Any]:
        """What an SAE trained on the rows records of them: model, site, text, and how rows were chosen."""
        origin = {name: value for name, value in asdict(self.meta).items() if name not in ("d_in", "dtype")}
        if origin["norm_median"] is None and isinstance(self.cursor, dict) and self.cursor.get("median_norm"):
            # Stores made before the two fields were there have the median in the harvester's own state.
            median, multiple = self.cursor["median_norm"], self.meta.max_norm_multiple
            origin |= {"norm_median": median, "norm_limit": None if multiple is None else multiple * median}
        return origin

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
