"""``manifest.json``: what a store's rows are, its finished shards, and where a resumed harvest goes on."""

from __future__ import annotations

import hashlib
import json
import re
import types
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from expander_sae.files import atomic_write_json, user_path

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

    def __post_init__(self) -> None:
        if self.rows < 1 or self.bytes < 1 or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"shard {self.file!r} has {self.rows} rows, {self.bytes} bytes, SHA-256 {self.sha256!r}")


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
        """Write it atomically into ``folder``, with a hash of itself."""
        counts = {"num_rows": self.num_rows, "num_shards": len(self.shards)}
        data = {"version": FORMAT_VERSION, **counts, **asdict(self)}
        atomic_write_json(folder / MANIFEST, data | {"sha256": _own_hash(data)})

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read a folder's manifest. ``StoreError`` if missing, damaged or of another format version.

        A manifest without a hash of itself, as they were written at first, is read too.
        """
        path = user_path(folder) / MANIFEST
        try:
            data = json.loads(path.read_bytes(), parse_constant=_no_number)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"{folder} is not an activation store: it has no {MANIFEST}") from None
        except IsADirectoryError:
            raise StoreError(f"{path} is a folder, not a file. {AGAIN}") from None
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{path} is not JSON ({error}). {AGAIN}") from None
        version = data.get("version") if isinstance(data, dict) else None
        if type(version) is not int or version != FORMAT_VERSION:
            raise StoreError(f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}. {AGAIN}")
        try:
            return cls._from_json(data)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{path} is damaged: {error}. {AGAIN}") from None

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Manifest:
        """``ValueError`` for anything but what ``write`` writes."""
        data = dict(data)
        own_hash = data.pop("sha256", None)
        counts = {name: data.pop(name, None) for name in ("version", "num_rows", "num_shards")}
        if own_hash is not None and own_hash != _own_hash(counts | data):
            raise ValueError("it is not what was written (its SHA-256 differs)")
        if missing := [f.name for f in fields(cls) if f.name not in data]:
            raise ValueError(f"it has no {', '.join(missing)}")
        manifest = _built(cls, data)
        if min(manifest.left_out_by_position, manifest.left_out_by_norm) < 0:
            raise ValueError("a count is negative")
        names = [shard_name(i) for i in range(len(manifest.shards))]
        found = (manifest.num_rows, len(manifest.shards), [shard.file for shard in manifest.shards])
        if found != (counts["num_rows"], counts["num_shards"], names):
            raise ValueError("its counts and its list of shards disagree")
        return manifest


_T = TypeVar("_T")


def _built(kind: type[_T], value: Any) -> _T:
    """The dataclass of a JSON object, every type checked. ``ValueError`` names the first field that is wrong."""
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(value, dict) or value.keys() - set(names):
        unknown = sorted(value.keys() - set(names)) if isinstance(value, dict) else value
        raise ValueError(f"{kind.__name__} is made of {', '.join(names)}, not of {unknown!r:.200}")
    try:
        return kind(**{name: _checked(value[name], hints[name], name) for name in value})
    except TypeError as error:  # a field is missing
        raise ValueError(str(error)) from None


def _checked(value: Any, hint: Any, name: str) -> Any:
    """A JSON value as the annotation of its field wants it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or (origin is Literal and value in arguments):
        return value
    if origin in (Union, types.UnionType):
        for choice in arguments:
            try:
                return _checked(value, choice, name)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, list):
        return tuple(_checked(item, arguments[0], name) for item in value)
    elif hint in (StoreMeta, Shard):
        return _built(hint, value)
    elif type(value) is (origin or hint) or (hint is float and type(value) is int):
        return value
    raise ValueError(f"{name} is {value!r:.200}, not {getattr(hint, '__name__', hint)}")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _own_hash(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


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
