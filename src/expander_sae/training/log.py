"""The training log: JSON lines on disk, and TensorBoard or Weights & Biases when installed and asked for."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from expander_sae import files

LOG_NAME = "log.jsonl"
_TAIL = 8
TRACKERS = ("tensorboard", "wandb")


class TrainingLog:
    """One line a logging interval.

    Args:
        path: the JSONL file, or ``None`` to keep nothing on disk.
        start: first step of this run; lines from beyond it (written after the checkpoint it resumes) are dropped.
        trackers: names from :data:`TRACKERS`.
        settings: shown as the run's configuration by the trackers.

    Raises:
        ValueError: unknown tracker.
        ImportError: a tracker that is not installed.
    """

    def __init__(self, path: Path | None, start: int, trackers: tuple[str, ...], settings: dict[str, Any]) -> None:
        kept = _lines_until(path, start) if path is not None and start else []
        self._tail: deque[dict[str, Any]] = deque(kept, maxlen=_TAIL)
        self._file: TextIO | None = None
        self._trackers = [_open_tracker(name, path, settings) for name in trackers]
        if path is not None:
            files.atomic_write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = open(path, "a")  # noqa: SIM115 (closed by close())

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        self._tail.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.write(line)

    def tail(self) -> list[dict[str, Any]]:
        """The last lines written."""
        return list(self._tail)

    def close(self) -> None:
        """Flush and close everything."""
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # the line a crash cut short
            continue
        if line["step"] <= step:
            lines.append(line)
    return lines


class _TensorBoard:
    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(path.parent if path else Path("runs")))
        self.writer.add_text("settings", f"```\n{json.dumps(settings, indent=2)}\n```")

    def write(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if value is not None:
                self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        import wandb  # type: ignore[import-not-found]

        self.run = wandb.init(project="expander-sae", config=settings, dir=str(path.parent) if path else None)

    def write(self, line: dict[str, Any]) -> None:
        self.run.log(line, step=line["step"])

    def close(self) -> None:
        self.run.finish()


def _open_tracker(name: str, path: Path | None, settings: dict[str, Any]) -> _TensorBoard | _WandB:
    kinds = {"tensorboard": _TensorBoard, "wandb": _WandB}
    if name not in kinds:
        raise ValueError(f"unknown tracker {name!r}; choose from {', '.join(TRACKERS)}")
    try:
        return kinds[name](path, settings)
    except ImportError as error:
        raise ImportError(f"{name} is asked for but not installed: pip install 'expander-sae[track]'") from error
