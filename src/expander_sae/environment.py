"""Versions and machine, recorded with every result; devices by name."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expander_sae import __version__

if TYPE_CHECKING:
    import torch


def environment() -> dict[str, Any]:
    """Versions and machine, so that a figure can be traced and repeated."""
    import torch

    return {
        "expander_sae": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_kernels": find_spec("expander_sae._kernels") is not None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_named(device: str | torch.device | None) -> torch.device:
    """The device called so; ``None`` is CUDA if there is one, else the CPU.

    Raises:
        ValueError: no name of a device, or a CUDA device where there is none.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"{device!r} is no device torch knows ({str(error).splitlines()[0]}): use cpu or cuda"
        ) from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(where)!r} was asked for, but torch {torch.__version__} sees no CUDA device here. "
            "Leave the device out to run on the CPU, or install a build of torch for your GPU."
        )
    return where


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
