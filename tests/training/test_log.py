"""The training log: what is written, what a resumed run keeps, trackers that are there and that are not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from expander_sae.training.log import TrainingLog


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, steps: range) -> None:
    log = TrainingLog(path, 0, (), {})
    for step in steps:
        log.write({"step": step, "loss": 1 / step})
    log.close()


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log", 0, (), {})
    for step in (1, 2):
        log.write({"step": step, "loss": 0.5, "fvu": None})
        assert lines(tmp_path / "log")[-1] == {"step": step, "loss": 0.5, "fvu": None}
    log.close()
    assert len(lines(tmp_path / "log")) == 2


def test_the_tail_is_short(tmp_path: Path) -> None:
    log = TrainingLog(None, 0, (), {})
    for step in range(50):
        log.write({"step": step, "loss": 0.0})
    assert [line["step"] for line in log.tail()] == list(range(42, 50))
    log.close()


def test_a_new_run_starts_a_new_log(tmp_path: Path) -> None:
    write(tmp_path / "log", range(1, 5))
    TrainingLog(tmp_path / "log", 0, (), {}).close()
    assert lines(tmp_path / "log") == []


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, range(1, 20))
    with open(path, "a") as file:
        file.write('{"step": 20, "lo')  # cut short by a crash
    log = TrainingLog(path, 12, (), {})
    assert [line["step"] for line in log.tail()] == list(range(5, 13))
    log.write({"step": 13, "loss": 7.0})
    log.close()
    assert [line["step"] for line in lines(path)] == list(range(1, 14))
    assert lines(path)[-1]["loss"] == 7.0


def test_a_resumed_run_without_a_log(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "new" / "log", 12, (), {})
    log.write({"step": 13, "loss": 1.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path / "new" / "log")] == [13]


def test_unknown_tracker(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown tracker 'mlflow'; choose from tensorboard, wandb"):
        TrainingLog(tmp_path / "log", 0, ("mlflow",), {})


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed_says_how(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"{name} is asked for but not installed: pip install 'expander-sae\[track\]'"
    ):
        TrainingLog(None, 0, (name,), {})


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            seen.append(folder)

        def add_text(self, name: str, text: str) -> None:
            seen.append((name, '"steps": 5' in text))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def close(self) -> None:
            seen.append("closed")

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    log = TrainingLog(tmp_path / "log", 0, ("tensorboard",), {"steps": 5})
    log.write({"step": 3, "loss": 0.5, "fvu": None})
    log.close()
    assert seen == [str(tmp_path), ("settings", True), ("step", 3, 3), ("loss", 0.5, 3), "closed"]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Run:
        def log(self, line: dict[str, Any], step: int) -> None:
            seen.append((line, step))

        def finish(self) -> None:
            seen.append("finished")

    fake = ModuleType("wandb")
    fake.init = lambda **options: seen.append(options) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = TrainingLog(tmp_path / "log", 0, ("wandb",), {"steps": 5})
    log.write({"step": 3, "loss": 0.5})
    log.close()
    assert seen[0]["config"] == {"steps": 5}
    assert seen[1:] == [({"step": 3, "loss": 0.5}, 3), "finished"]
