"""A training run's state in one safetensors file, written atomically, tied to the configuration it belongs to."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from expander_sae import files

CHECKPOINT_NAME = "checkpoint.safetensors"
FORMAT = "2"
_REMEDY = "delete it to start afresh"

# What safetensors calls the dtypes that a training state has.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint file holds.

    ``identity``: the configuration of the run it belongs to. ``tensors`` are mapped from the file (copied when
    written to), ``numbers`` is everything else.
    """

    identity: dict[str, Any]
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


class Checkpoint:
    """The checkpoint of one run.

    Args:
        path: the file.
        identity: what must agree for the run to be continued (JSON values, nested dicts).
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))  # as it will be read back; what is no JSON fails here

    def save(self, state: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
        """Replace the file with ``(tensors, numbers)``. Raises ``OSError`` if it cannot be written."""
        tensors, numbers = state
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header = {"format": FORMAT, "identity": json.dumps(self.identity), "numbers": json.dumps(numbers)}
        header["sha256"] = _digest(stored, header)
        with files.atomic_path(self.path) as temporary:
            try:
                save_file(stored, temporary, header)
            except SafetensorError as error:  # it wraps the operating system's errors
                raise OSError(f"could not write {self.path}: {error}") from error

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The saved state, or ``None`` if there is none.

        Raises:
            ValueError: unreadable, altered, or of a run with another configuration; the differing fields are named.
        """
        try:
            saved = self.peek(self.path)
        except FileNotFoundError:
            return None
        different = _differences(saved.identity, self.identity)
        if different:
            raise ValueError(
                f"{self.path} belongs to another run: {'; '.join(different)}. Use the same settings to continue it, "
                "another out folder, or restart to discard it."
            )
        return saved.tensors, saved.numbers

    @staticmethod
    def peek(path: str | Path) -> SavedState:
        """What a checkpoint holds, whatever run it belongs to.

        The file is opened once: what is read is one checkpoint even while a run replaces it by the next. Its hash,
        of every name, type, shape and value, is checked.

        Raises:
            FileNotFoundError: there is none.
            ValueError: unreadable or altered; the message names the file.
        """
        path = files.user_path(path)
        try:
            with open(path, "rb") as file:
                # Of this very file, which stays whole until it is closed; pages that are written to are copied.
                content = (
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if os.fstat(file.fileno()).st_size else b""
                )
            return _parsed(content)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no checkpoint {path}") from None
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"the checkpoint {path} cannot be read ({error}); {_REMEDY}") from None


def _parsed(content: mmap.mmap | bytes) -> SavedState:
    """The state in the bytes of a safetensors file: a length, a JSON header, the tensors.

    Not by ``safe_open``, which opens a file by its name, and again for its tensors. ``ValueError`` if damaged.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    if not 8 < end <= len(content):
        raise ValueError(f"it has {len(content)} bytes and no whole header")
    entries = _object(content[8:end], "the header")
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("it is no checkpoint of a training run: it has no metadata")
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}, this program reads {FORMAT!r}")
    tensors, place = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: _offsets(*item)):
        start, stop = _offsets(name, entry)
        if start != place:
            raise ValueError(f"the bytes of {name!r} do not follow those before them")
        tensors[name] = _tensor(content, end, name, entry)
        place = stop
    if end + place != len(content):
        raise ValueError(f"it has {len(content)} bytes, its header says {end + place}")
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise ValueError("its content is not what was written")
    identity, numbers = (_object(metadata.get(key, ""), f"its {key}") for key in ("identity", "numbers"))
    return SavedState(identity, tensors, numbers)


def _object(text: str | bytes, what: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no JSON object")
    return value


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, after the header."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets):
        return offsets[0], offsets[1]
    raise ValueError(f"the header says no bytes for {name!r}")


def _tensor(content: mmap.mmap | bytes, end: int, name: str, entry: dict[str, Any]) -> Tensor:
    start, stop = _offsets(name, entry)
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name!r} has the dtype {dtype!r}, which no training state has")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"{name!r} has the shape {shape!r}")
    count = math.prod(shape)
    if not 0 <= start <= stop <= len(content) - end or stop - start != count * _DTYPES[dtype].itemsize:
        raise ValueError(f"{name!r} of shape {shape} has the bytes {start} to {stop} of {len(content) - end}")
    if not count:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    return torch.frombuffer(content, dtype=_DTYPES[dtype], count=count, offset=end + start).reshape(shape)


def _digest(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """SHA-256 of everything in the file."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _differences(saved: Any, asked: Any, name: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(asked, dict):
        keys = sorted(saved.keys() | asked.keys())
        return [
            line for key in keys for line in _differences(saved.get(key), asked.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if saved == asked else [f"{name} was {saved!r} and is {asked!r}"]
