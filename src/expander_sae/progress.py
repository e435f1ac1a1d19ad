"""One progress bar for every long step: done, rate and time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class Advance(Protocol):
    """What :func:`progress` yields: call it with the units just done and, if wanted, a short note."""

    def __call__(self, amount: int = 1, *, note: str | None = None) -> None: ...


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s", style="cyan")


@contextmanager
def progress(description: str, total: int, unit: str = "it", *, done: int = 0) -> Iterator[Advance]:
    """A bar on standard error. ``done`` units (a resumed job) count as finished but not towards the rate."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=12),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
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
