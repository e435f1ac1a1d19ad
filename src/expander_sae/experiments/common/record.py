"""How every experiment's result is written down: rows, settings, versions and machine, as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from expander_sae import files
from expander_sae.environment import environment
from expander_sae.report.table import Column, Row, markdown_table, print_table


def conclude(
    folder: Path,
    rows: Sequence[Row],
    columns: Sequence[Column],
    settings: Mapping[str, Any],
    title: str,
    notes: Sequence[str],
    picture: str,
    plot: Callable[[Sequence[Row], Path, str], None],
    *,
    also: Sequence[str] = (),
) -> None:
    """How every experiment ends: files written into ``folder``, table and notes printed, the files named.

    Args:
        folder: where to.
        rows, columns: the table.
        settings: what the result depends on.
        title: over table and picture.
        notes: under the table, a paragraph each.
        picture: name of the PNG that ``plot(rows, path, title)`` writes.
        also: other things the experiment has put there, for the last line.
    """
    write_results(folder, rows, columns, settings, title, notes)
    plot(rows, folder / picture, title)
    print_table(rows, columns, title)
    print("\n".join(notes))
    *written, last = "results.json", "results.md", picture, *also
    print(f"\nWrote {', '.join(written)} and {last} in {folder}.")


def write_results(
    folder: Path,
    rows: Sequence[Row],
    columns: Sequence[Column],
    settings: Mapping[str, Any],
    title: str,
    notes: Sequence[str],
) -> None:
    """``results.json`` (everything) and ``results.md`` (table and notes) in ``folder``."""
    whole = {
        "title": title,
        "settings": settings,
        "environment": environment(),
        "notes": list(notes),
        "rows": list(rows),
    }
    files.atomic_write_json(folder / "results.json", whole)
    text = f"# {title}\n\n{markdown_table(rows, columns)}\n" + "".join(f"{note}\n\n" for note in notes)
    files.atomic_write_bytes(folder / "results.md", text.encode())
