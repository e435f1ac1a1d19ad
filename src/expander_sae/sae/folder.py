"""The folder an SAE is stored in: ``config.json`` and ``sae.safetensors`` (docs/formats.md).

A save is one atomic change. The new tensors are written beside the old ones as ``sae.next.safetensors``; the rename of
``config.json``, which names the tensor file's hash, is the change; then the tensors are renamed into place. A reader
takes the tensor file that the config names, whatever it is called at that moment.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from expander_sae import files

FORMAT = "expander-sae"
FORMAT_VERSION = 2
CONFIG_NAME = "config.json"
TENSORS_NAME = "sae.safetensors"
_NEXT_NAME = "sae.next.safetensors"
_OWN_KEYS = ("format", "version", "files", "config_sha256")
_TRIES = 20  # a reader meets a save in progress at most so often


class SAEFolderError(ValueError):
    """The folder does not hold a whole, unaltered SAE that this version can read."""


def write(folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files. An SAE that was in the folder stays readable until the new one is whole, whatever happens.

    Raises:
        OSError: the disk is full or cannot be written.
        TypeError, ValueError: a config that is no JSON.
    """
    folder = Path(folder).expanduser()
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    whole = {"format": FORMAT, "version": FORMAT_VERSION} | config
    json.dumps(whole, allow_nan=False)  # what is no JSON fails before anything is touched
    _finish_switch(folder)
    try:
        with files.atomic_path(folder / _NEXT_NAME) as tensor_file:
            try:
                safetensors.torch.save_file(stored, tensor_file)
            except SafetensorError as error:  # it wraps the operating system's errors
                raise OSError(f"could not write {folder / TENSORS_NAME}: {error}") from error
            recorded = {"sha256": files.sha256_file(tensor_file), "bytes": tensor_file.stat().st_size}
        whole["files"] = {TENSORS_NAME: recorded}
        whole["config_sha256"] = _config_hash(whole)
        files.atomic_write_json(folder / CONFIG_NAME, whole)  # the switch
    except BaseException:
        _finish_switch(folder)
        raise
    (folder / _NEXT_NAME).replace(folder / TENSORS_NAME)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config of a folder, checked against its own hash.

    Raises:
        SAEFolderError: no folder or no config, not JSON, another format or version, or altered.
    """
    path = Path(folder).expanduser() / CONFIG_NAME
    if not path.exists():
        raise SAEFolderError(f"{folder} holds no {CONFIG_NAME}: not an SAE folder, or its writing was cut off")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SAEFolderError(f"{path} is not readable JSON ({error}); fetch or save the SAE again") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise SAEFolderError(f"{path} is not of the format {FORMAT!r}")
    if config.get("version") != FORMAT_VERSION:
        raise SAEFolderError(
            f"{path} has format version {config.get('version')!r}, this program reads version {FORMAT_VERSION}; "
            "train and save the SAE again, or use the expander-sae that wrote it"
        )
    if config.get("config_sha256") != _config_hash(config):
        raise SAEFolderError(f"{path} was altered after it was written: its contents do not match config_sha256")
    return config


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config (without the format's own keys) and tensors, the tensor file checked against its recorded size and hash.

    Raises:
        SAEFolderError: see :func:`read_config`; a missing, truncated or altered tensor file is named.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder)
    unchanged = 0
    for _ in range(_TRIES):
        data, problem = _tensor_data(folder, config)
        if data is not None:
            return {key: value for key, value in config.items() if key not in _OWN_KEYS}, _tensors(folder, data)
        before, config = config, read_config(folder)
        unchanged = unchanged + 1 if config == before else 0
        if unchanged == 2:  # once: the tensors may have been renamed into place between the two looks
            raise SAEFolderError(problem)
    raise SAEFolderError(f"{folder} is being saved again and again: read it when that has ended")


def tensor_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of the tensors' data."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tensor_data(folder: Path, config: dict[str, Any]) -> tuple[bytes | None, str]:
    """The bytes of the tensor file that the config names, or why there are none."""
    recorded = config.get("files")
    recorded = recorded.get(TENSORS_NAME) if isinstance(recorded, dict) else None
    if not isinstance(recorded, dict) or not {"sha256", "bytes"} <= recorded.keys():
        raise SAEFolderError(f"{folder / CONFIG_NAME} names no {TENSORS_NAME} with its size and hash")
    problem = f"{folder} lacks {TENSORS_NAME}, which its {CONFIG_NAME} lists; fetch or save the SAE again"
    for name in (TENSORS_NAME, _NEXT_NAME):
        path = folder / name
        try:
            size = path.stat().st_size
            if size != recorded["bytes"]:
                found = f"{path} has {size} bytes, {CONFIG_NAME} records {recorded['bytes']}: truncated or altered"
            else:
                data = path.read_bytes()  # once: what is hashed is what is parsed
                digest = hashlib.sha256(data).hexdigest()
                if digest == recorded["sha256"]:
                    return data, ""
                found = f"{path} was altered: its SHA-256 is {digest}, {CONFIG_NAME} records {recorded['sha256']}"
        except FileNotFoundError:
            continue
        problem = found if name == TENSORS_NAME else problem
    return None, problem


def _tensors(folder: Path, data: bytes) -> dict[str, Tensor]:
    try:
        # Copies, because those of the file lie at any address: matrix products round differently there, and an SAE
        # should give after loading, bit for bit, what it gave before.
        return {name: tensor.clone() for name, tensor in safetensors.torch.load(data).items()}
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SAEFolderError(f"{folder / TENSORS_NAME} cannot be read: {error}") from None


def _finish_switch(folder: Path) -> None:
    """Bring what a killed save left into order: tensors the config already names go to their place, others go."""
    if folder.is_dir():
        files.remove_leftovers(folder)
    waiting = folder / _NEXT_NAME
    if not waiting.exists():
        return
    try:
        recorded = read_config(folder)["files"][TENSORS_NAME]["sha256"]
    except (SAEFolderError, KeyError, TypeError):
        recorded = None
    if files.sha256_file(waiting) == recorded:
        waiting.replace(folder / TENSORS_NAME)
    else:
        waiting.unlink()


def _config_hash(config: dict[str, Any]) -> str:
    body = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
