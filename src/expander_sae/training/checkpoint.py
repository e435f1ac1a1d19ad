"""A training run's state in one safetensors file, written atomically, tied to the configuration it belongs to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expander_sae import files

CHECKPOINT_NAME = "checkpoint.safetensors"


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
        header = {"identity": json.dumps(self.identity), "numbers": json.dumps(numbers)}
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
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if header.pop("sha256") != _digest(tensors, header):
                raise ValueError("its content is not what was written")
            identity, numbers = json.loads(header["identity"]), json.loads(header["numbers"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"the checkpoint {self.path} cannot be read ({error}); delete it to start afresh"
            ) from None
        different = _differences(identity, self.identity)
        if different:
            raise ValueError(
                f"{self.path} belongs to another run: {'; '.join(different)}. Use the same settings to continue it, "
                "another out folder, or restart to discard it."
            )
        return tensors, numbers


def _digest(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """SHA-256 of everything in the file."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _differences(saved: Any, asked: Any, name: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(asked, dict):
        keys = sorted(saved.keys() | asked.keys())
        return [
            line for key in keys for line in _differences(saved.get(key), asked.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if saved == asked else [f"{name} was {saved!r} and is {asked!r}"]
