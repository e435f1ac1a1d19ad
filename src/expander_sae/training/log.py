"""The training log: JSON lines on disk, and TensorBoard or Weights & Biases when installed and asked for."""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from expander_sae import files
from expander_sae.registry import unknown

LOG_NAME = "log.jsonl"
TRACKER_NAME = "trackers.json"
_TAIL = 8
_CHECK = "crc32"
_PROJECT = "expander-sae"


@dataclass(frozen=True)
class Trackers:
    """Where else the log goes.

    Attributes:
        names: any of ``"tensorboard"``, ``"wandb"``.
        project: W&B project; default the one of the run that is continued, else ``expander-sae``.
        run_name: what the run is called there; default likewise, else the folder's name.
    """

    names: tuple[str, ...] = ()
    project: str | None = None
    run_name: str | None = None


class TrainingLog:
    """One line for each logging interval, with a checksum of its own.

    Args:
        path: the JSONL file, or ``None`` to keep nothing on disk.
        start: steps done before; lines from beyond them (written after the checkpoint it resumes) are dropped.
        trackers: where else the lines go. A continued run goes on as the same run there.
        settings: shown as the run's configuration by the trackers.

    Raises:
        ValueError: unknown tracker, or a damaged log; file and line are named.
        ImportError: a tracker that is not installed.
    """

    def __init__(self, path: Path | None, start: int, trackers: Trackers | None, settings: dict[str, Any]) -> None:
        kept = [line for line in read_log(path) if line["step"] <= start] if path and start and path.exists() else []
        self._tail: deque[dict[str, Any]] = deque(kept, maxlen=_TAIL)
        self._file: TextIO | None = None
        trackers = trackers or Trackers()
        self._trackers = [_open_tracker(name, trackers, path, start, settings) for name in trackers.names]
        if path is not None:
            files.atomic_write_bytes(path, "".join(map(_checked, kept)).encode())
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        self._tail.append(line)
        if self._file is not None:
            self._file.write(_checked(line))
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


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without their checksums. A last line that a crash cut short is left out.

    Raises:
        OSError: it cannot be read.
        ValueError: a line that is not what was written; file and line are named.
    """
    whole = path.read_bytes().split(b"\n")[:-1]  # behind the last line end: nothing, or a line cut short
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
            recorded = line.pop(_CHECK)
            if recorded != _crc(line) or type(line["step"]) is not int:
                raise ValueError("its checksum is another")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"line {number} of {path} is not what was written ({error}): restore the file, or delete it to go on "
                "with a new log"
            ) from None
        lines.append(line)
    return lines


def _checked(line: dict[str, Any]) -> str:
    return json.dumps(line | {_CHECK: _crc(line)}) + "\n"


def _crc(line: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(line).encode()):08x}"


class Tracker(Protocol):
    """A service that shows curves."""

    def write(self, line: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, trackers: Trackers, path: Path | None, start: int, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was shown beyond the checkpoint is purged: it will be written again.
        self.writer = SummaryWriter(str(path.parent if path else Path("runs")), purge_step=start + 1 if start else None)
        self.writer.add_text("settings", f"```\n{json.dumps(settings, indent=2)}\n```")

    def write(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if value is not None:
                self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, trackers: Trackers, path: Path | None, start: int, settings: dict[str, Any]) -> None:
        import wandb  # type: ignore[import-not-found]

        record = path.parent / TRACKER_NAME if path else None
        known = _stored_run(record) if record is not None and start else {}
        project = trackers.project or known.get("project") or _PROJECT
        name = trackers.run_name or known.get("name") or (path.parent.resolve().name if path else None)
        again = {"id": known["id"], "resume": "allow"} if known.get("project") == project else {}
        self.run = wandb.init(
            project=project, name=name, config=settings, dir=str(path.parent) if path else None, **again
        )
        if record is not None:
            files.atomic_write_json(record, {"wandb": {"id": self.run.id, "project": project, "name": name}})

    def write(self, line: dict[str, Any]) -> None:
        self.run.log(line, step=line["step"])

    def close(self) -> None:
        self.run.finish()


def _stored_run(record: Path) -> dict[str, str]:
    """Id, project and name of the W&B run that a folder's run was shown as; empty if it was shown nowhere."""
    if not record.exists():
        return {}
    try:
        run = json.loads(record.read_text(encoding="utf-8"))["wandb"]
        if all(isinstance(run[key], str) for key in ("id", "project", "name")):
            return run
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{record} is damaged: delete it to go on as a new W&B run")


_OPENERS: dict[str, Callable[..., Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
TRACKERS = tuple(_OPENERS)
"""Names of the trackers."""


def _open_tracker(name: str, trackers: Trackers, path: Path | None, start: int, settings: dict[str, Any]) -> Tracker:
    if name not in _OPENERS:
        raise ValueError(unknown("tracker", name, TRACKERS))
    try:
        return _OPENERS[name](trackers, path, start, settings)
    except ImportError as error:
        raise ImportError(f"{name} is asked for but not installed: pip install 'expander-sae[track]'") from error
