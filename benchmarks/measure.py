"""The stop-watch: contenders take turns on the same input; medians, spread and peak memory come out as rows."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from benchmarks.cases import Shape
from expander_sae.files import human_bytes

_SHORTEST = 0.02  # seconds; a shorter run is repeated until its turn lasts this long
_MOST_IN_A_TURN = 50
_REST = 0.02  # seconds between turns: threads of the last one stop spinning
_MEMORY_SHARE = 0.6  # of the memory that is free, the most a contender may need

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    repeats: int = 5
    """Turns each contender gets; the median counts."""
    threads: int = 1
    """Threads everybody may use."""
    batch: int = 1024
    """Samples per batch."""


@dataclass(frozen=True)
class Row:
    """One contender on one case."""

    suite: str
    case: str
    name: str
    ours: bool = False
    samples: int = 0
    seconds: list[float] = field(default_factory=list)
    """Of each turn, for ``samples`` samples."""
    memory_bytes: int | None = None
    """Peak while it runs: its weights, state and working memory, without the input."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Name of a contender of ours to how many times less time it takes a sample than this peer."""
    note: str = ""
    """What the check of the answers said, or why there is no time."""

    @property
    def per_sample(self) -> float:
        """Median seconds per sample."""
        return statistics.median(self.seconds) / self.samples


@dataclass(frozen=True)
class _Runner:
    run: Callable[[], object]
    row: Row
    turns: int  # runs in a turn


class Race:
    """A case and those that run it."""

    def __init__(self, suite: str, case: Shape | str, settings: Settings) -> None:
        self.suite, self.case, self.settings = suite, str(case), settings
        self._entries: dict[str, _Runner | Row] = {}

    def enter(
        self,
        name: str,
        build: Callable[[], Callable[[], Answer]],
        *,
        samples: int,
        ours: bool = False,
        needs: int = 0,
        shares: str | None = None,
    ) -> Answer | None:
        """Build a contender, run it twice, and return the first answer for checking.

        Args:
            name: what the table calls it.
            build: makes weights and state, and returns what is timed.
            samples: how many one run works on.
            ours: this project's; peers are compared with it.
            needs: bytes it is expected to need. Where they are not free, it is listed as skipped and ``None`` returned.
            shares: the contender whose weights and state it uses; what that one took counts for both.
        """
        row = Row(self.suite, self.case, name, ours, samples)
        if not fits(needs):
            self._entries[name] = replace(row, note=f"skipped: needs about {human_bytes(needs)}")
            return None
        _return_free_memory()
        before = memory("VmRSS")
        run = build()
        _return_free_memory()
        reset_peak()
        answer = run()
        peak = memory("VmHWM")
        used = None if before is None or peak is None else max(0, peak - before)
        if shares is not None and isinstance(other := self._entries[shares], _Runner):
            used = other.row.memory_bytes
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        turns = min(_MOST_IN_A_TURN, max(1, math.ceil(_SHORTEST / max(seconds, 1e-6))))
        self._entries[name] = _Runner(run, replace(row, memory_bytes=used), turns)
        return answer

    def absent(self, name: str, why: str) -> None:
        """List a contender that cannot run."""
        self._entries[name] = Row(self.suite, self.case, name, note=why)

    def note(self, name: str, text: str) -> None:
        """Say of a contender how its answer compares."""
        entry = self._entries[name]
        self._entries[name] = replace(entry, row=replace(entry.row, note=text)) if isinstance(entry, _Runner) else entry

    def rows(self) -> list[Row]:
        """Let them run in turns, and compare."""
        runners = {name: entry for name, entry in self._entries.items() if isinstance(entry, _Runner)}
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(self.settings.repeats):
            for name, runner in runners.items():
                time.sleep(_REST)
                start = time.perf_counter()
                for _ in range(runner.turns):
                    runner.run()
                seconds[name].append((time.perf_counter() - start) / runner.turns)
        timed = {name: replace(runner.row, seconds=seconds[name]) for name, runner in runners.items()}
        mine = [row for row in timed.values() if row.ours]
        rows = [timed.get(name, entry) for name, entry in self._entries.items()]
        return [compare(row, mine) for row in rows if isinstance(row, Row)]


def compare(row: Row, mine: list[Row]) -> Row:
    """A peer's row with its ratio to each of ours."""
    if row.ours or not row.seconds:
        return row
    return replace(row, ratios={own.name: row.per_sample / own.per_sample for own in mine})


def memory(key: str) -> int | None:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (peak) of this process; ``None`` off Linux.

    Not ``ru_maxrss``: that one a child inherits from the process that started it.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None


def reset_peak() -> None:
    """Let ``VmHWM`` start again from ``VmRSS``."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def fits(needs: int) -> bool:
    """Whether ``needs`` bytes can be had without crowding out everything else."""
    return needs <= _MEMORY_SHARE * _free_bytes()


def _free_bytes() -> float:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return math.inf


def _return_free_memory() -> None:
    """Give freed heap back to the system, so that the next contender is charged for what it takes."""
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
