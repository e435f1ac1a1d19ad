"""The training log: what is written, what a resumed run keeps, trackers that are there and that are not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from expander_sae.training.log import Trackers, TrainingLog, read_log


def lines(path: Path) -> list[dict[str, Any]]:
    return read_log(path)


def write(path: Path, steps: range) -> None:
    log = TrainingLog(path, 0, None, {})
    for step in steps:
        log.write({"step": step, "loss": 1 / step})
    log.close()


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log", 0, None, {})
    for step in (1, 2):
        log.write({"step": step, "loss": 0.5, "fvu": None})
        assert lines(tmp_path / "log")[-1] == {"step": step, "loss": 0.5, "fvu": None}
    log.close()
    assert len(lines(tmp_path / "log")) == 2


def test_the_tail_is_short(tmp_path: Path) -> None:
    log = TrainingLog(None, 0, None, {})
    for step in range(50):
        log.write({"step": step, "loss": 0.0})
    assert [line["step"] for line in log.tail()] == list(range(42, 50))
    log.close()


def test_a_new_run_starts_a_new_log(tmp_path: Path) -> None:
    write(tmp_path / "log", range(1, 5))
    TrainingLog(tmp_path / "log", 0, None, {}).close()
    assert lines(tmp_path / "log") == []


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, range(1, 20))
    with open(path, "a") as file:
        file.write('{"step": 20, "lo')  # cut short by a crash
    log = TrainingLog(path, 12, None, {})
    assert [line["step"] for line in log.tail()] == list(range(5, 13))
    log.write({"step": 13, "loss": 7.0})
    log.close()
    assert [line["step"] for line in lines(path)] == list(range(1, 14))
    assert lines(path)[-1]["loss"] == 7.0


def test_a_resumed_run_without_a_log(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "new" / "log", 12, None, {})
    log.write({"step": 13, "loss": 1.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path / "new" / "log")] == [13]


def test_unknown_tracker(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown tracker 'mlflow'; choose one of 'tensorboard', 'wandb'"):
        TrainingLog(tmp_path / "log", 0, Trackers(("mlflow",)), {})


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed_says_how(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"{name} is asked for but not installed: pip install 'expander-sae\[track\]'"
    ):
        TrainingLog(None, 0, Trackers((name,)), {})


def test_a_line_says_what_it_should_be(tmp_path: Path) -> None:
    write(tmp_path / "log", range(1, 4))
    for text, line in zip((tmp_path / "log").read_text().splitlines(), lines(tmp_path / "log"), strict=True):
        whole = json.loads(text)
        assert len(whole.pop("crc32")) == 8
        assert whole == line


def test_every_damaged_line_is_named(tmp_path: Path) -> None:
    """Each bit of each byte: found by its line, unless it is the last line that a crash may have cut short."""
    path = tmp_path / "log"
    write(path, range(1, 4))
    content = path.read_bytes()
    ends = [at for at, byte in enumerate(content) if byte == ord("\n")]
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            number = 1 + sum(end < place for end in ends)
            if place == ends[-1]:  # without its end the last line does not count
                assert len(read_log(path)) == 2
                continue
            with pytest.raises(ValueError, match=rf"line {number} of .*log is not what was written .*restore the file"):
                read_log(path)


@pytest.mark.parametrize("text", ["[]", "3", '{"step": 1}', '{"loss": 1, "crc32": "0"}', "\xff", "[" * 5000, ""])
def test_lines_that_are_something_else(text: str, tmp_path: Path) -> None:
    write(tmp_path / "log", range(1, 3))
    content = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(content + text.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"line 3 of .*log is not what was written"):
        TrainingLog(tmp_path / "log", 5, None, {})
    assert (tmp_path / "log").read_bytes().startswith(content)


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            seen.append((folder, purge_step))

        def add_text(self, name: str, text: str) -> None:
            seen.append((name, '"steps": 5' in text))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def close(self) -> None:
            seen.append("closed")

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    log = TrainingLog(tmp_path / "log", 0, Trackers(("tensorboard",)), {"steps": 5})
    log.write({"step": 3, "loss": 0.5, "fvu": None})
    log.close()
    assert seen == [(str(tmp_path), None), ("settings", True), ("step", 3, 3), ("loss", 0.5, 3), "closed"]
    TrainingLog(tmp_path / "log", 3, Trackers(("tensorboard",)), {"steps": 5}).close()
    assert (str(tmp_path), 4) in seen  # what was shown beyond step 3 goes


class FakeWandB:
    """Stands in for the module; runs get the ids ``run1``, ``run2``, … unless one is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Any] = []
        fake = ModuleType("wandb")
        fake.init = self.init  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wandb", fake)
        self.id = ""

    def init(self, **options: Any) -> FakeWandB:
        self.seen.append(options)
        self.id = options.get("id") or f"run{sum(isinstance(entry, dict) for entry in self.seen)}"
        return self

    def log(self, line: dict[str, Any], step: int) -> None:
        self.seen.append((line, step))

    def finish(self) -> None:
        self.seen.append("finished")


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandB(monkeypatch)
    log = TrainingLog(tmp_path / "log", 0, Trackers(("wandb",)), {"steps": 5})
    log.write({"step": 3, "loss": 0.5})
    log.close()
    assert fake.seen[0] == {
        "project": "expander-sae", "name": tmp_path.name, "config": {"steps": 5}, "dir": str(tmp_path)
    }  # fmt: skip
    assert fake.seen[1:] == [({"step": 3, "loss": 0.5}, 3), "finished"]


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandB(monkeypatch)
    TrainingLog(tmp_path / "log", 0, Trackers(("wandb",), "mine", "first"), {}).close()
    for start in (3, 7):
        TrainingLog(tmp_path / "log", start, Trackers(("wandb",)), {}).close()
    opened = [entry for entry in fake.seen if isinstance(entry, dict)]
    assert [(entry["project"], entry["name"]) for entry in opened] == [("mine", "first")] * 3
    again = ("run1", "allow")
    assert [(entry.get("id"), entry.get("resume")) for entry in opened] == [(None, None), again, again]
    TrainingLog(tmp_path / "log", 7, Trackers(("wandb",), "other"), {}).close()  # another project: another run
    TrainingLog(tmp_path / "log", 0, Trackers(("wandb",)), {}).close()  # from the start: another run
    assert ["id" in entry for entry in fake.seen if isinstance(entry, dict)][3:] == [False, False]


@pytest.mark.parametrize("text", ["", "{}", '{"wandb": 3}', '{"wandb": {"id": 1, "project": "p", "name": "n"}}'])
def test_a_damaged_record_of_the_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeWandB(monkeypatch)
    (tmp_path / "trackers.json").write_text(text)
    with pytest.raises(ValueError, match=r"trackers.json is damaged: delete it"):
        TrainingLog(tmp_path / "log", 3, Trackers(("wandb",)), {})
