"""The folder an SAE is stored in: ``config.json`` and ``sae.safetensors``, written atomically, checked on reading."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from expander_sae import files

FORMAT = "expander-sae"
FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
TENSORS_NAME = "sae.safetensors"


class SAEFolderError(ValueError):
    """The folder does not hold a whole, unaltered SAE that this version can read."""


def write(folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files.

    Both are written whole beside their places before either is moved there, ``config.json`` last: whatever fails on the
    way, an SAE that was in the folder stays, and a folder that has a config is whole.

    Raises:
        OSError: the disk is full or cannot be written.
        TypeError, ValueError: a config that is no JSON.
    """
    folder = Path(folder)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with (
        files.atomic_path(folder / CONFIG_NAME) as config_file,
        files.atomic_path(folder / TENSORS_NAME) as tensor_file,
    ):
        try:
            save_file(stored, tensor_file)
        except SafetensorError as error:  # it wraps the operating system's errors
            raise OSError(f"could not write {folder / TENSORS_NAME}: {error}") from error
        whole = {"format": FORMAT, "version": FORMAT_VERSION} | config
        recorded = {"sha256": files.sha256_file(tensor_file), "bytes": tensor_file.stat().st_size}
        whole["files"] = {TENSORS_NAME: recorded}
        whole["config_sha256"] = _config_hash(whole)
        config_file.write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config of a folder, checked against its own hash.

    Raises:
        SAEFolderError: no folder or no config, not JSON, another format or version, or altered.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.exists():
        raise SAEFolderError(f"{folder} holds no {CONFIG_NAME}: not an SAE folder, or its writing was cut off")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SAEFolderError(f"{path} is not readable JSON ({error}); fetch or save the SAE again") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise SAEFolderError(f"{path} is not of the format {FORMAT!r}")
    if config.get("version") != FORMAT_VERSION:
        raise SAEFolderError(
            f"{path} has format version {config.get('version')}, this program reads version {FORMAT_VERSION}; "
            "upgrade expander-sae or save the SAE with this version"
        )
    if config.get("config_sha256") != _config_hash(config):
        raise SAEFolderError(f"{path} was altered after it was written: its contents do not match config_sha256")
    return config


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors, the tensor file checked against its recorded size and hash.

    Raises:
        SAEFolderError: see :func:`read_config`; a missing, truncated or altered tensor file is named.
    """
    config = read_config(folder)
    for name, recorded in config["files"].items():
        path = Path(folder) / name
        if not path.exists():
            raise SAEFolderError(f"{folder} lacks {name}, which its {CONFIG_NAME} lists; fetch or save the SAE again")
        size = path.stat().st_size
        if size != recorded["bytes"]:
            raise SAEFolderError(
                f"{path} has {size} bytes, {CONFIG_NAME} records {recorded['bytes']}: truncated or altered"
            )
        digest = files.sha256_file(path)
        if digest != recorded["sha256"]:
            raise SAEFolderError(
                f"{path} was altered: its SHA-256 is {digest}, {CONFIG_NAME} records {recorded['sha256']}"
            )
    try:
        # Copies, because those of the file lie at any address: matrix products round differently there, and an SAE
        # should give after loading, bit for bit, what it gave before.
        return config, {name: tensor.clone() for name, tensor in load_file(Path(folder) / TENSORS_NAME).items()}
    except SafetensorError as error:
        raise SAEFolderError(f"{Path(folder) / TENSORS_NAME} cannot be read: {error}") from None


def tensor_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of the tensors' data."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _config_hash(config: dict[str, Any]) -> str:
    body = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def check_shape(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """``tensor`` if it is floating point with that shape, else :class:`SAEFolderError`."""
    if tuple(tensor.shape) != shape or not tensor.is_floating_point() or tensor.dtype not in _STORED:
        raise SAEFolderError(
            f"{name} should be floating point of shape {shape}, it is {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor


_STORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
