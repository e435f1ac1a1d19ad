"""How far a long step is, on standard error: a bar on a terminal, elsewhere a plain line every ten seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

INTERVAL = 10.0
"""Seconds between two plain lines."""


class Advance(Protocol):
    """What :func:`progress` yields: call it with the units just done and, if wanted, a short note."""

    def __call__(self, amount: int = 1, *, note: str | None = None) -> None: ...


@contextmanager
def progress(description: str, total: int, unit: str = "unit", *, done: int = 0) -> Iterator[Advance]:
    """Done, rate and time left of ``total`` units; nothing if all of them are done already.

    Args:
        description: what is being done.
        total: units in all.
        unit: what is counted.
        done: units of an earlier run; they count as finished, but not towards the rate.
    """
    console = Console(stderr=True)
    if done >= total:
        yield lambda amount=1, *, note=None: None
    elif console.is_terminal:
        yield from _bar(console, description, total, unit, done)
    else:
        yield from _lines(console, description, total, unit, done)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{_rate(speed)} {task.fields['unit']}/s", style="cyan")


def _bar(console: Console, description: str, total: int, unit: str, done: int) -> Iterator[Advance]:
    bar = Progress(
        TextColumn("{task.description:<22}", markup=False),
        BarColumn(bar_width=12),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=False,
    )
    with bar:
        task = bar.add_task(description, total=total, completed=done, unit=unit, note="")

        def advance(amount: int = 1, *, note: str | None = None) -> None:
            if note is None:
                bar.update(task, advance=amount)
            else:
                bar.update(task, advance=amount, note=note)

        yield advance


def _lines(console: Console, description: str, total: int, unit: str, done: int) -> Iterator[Advance]:
    began, reached, latest = time.monotonic(), done, ""
    over = threading.Event()

    def report() -> None:
        elapsed = max(time.monotonic() - began, 1e-9)
        rate = (reached - done) / elapsed
        left = "" if not rate or reached >= total else f", {duration((total - reached) / rate)} left"
        speed = f", {_rate(rate)} {unit}/s" if rate else ""
        note = f" ({latest})" if latest else ""
        line = f"{description}: {reached:,} of {total:,}, {duration(elapsed)}{speed}{left}{note}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def every_interval() -> None:
        while not over.wait(INTERVAL):
            report()

    def advance(amount: int = 1, *, note: str | None = None) -> None:
        nonlocal reached, latest
        reached += amount
        latest = latest if note is None else note

    thread = threading.Thread(target=every_interval, name="progress", daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        over.set()
        thread.join()
        report()


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def duration(seconds: float) -> str:
    """``"9 s"``, ``"2 min 5 s"``, ``"2 h 1 min"``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
