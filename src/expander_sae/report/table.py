"""Results as a readable table: on the terminal and as Markdown, from one list of columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from expander_sae.files import human_bytes

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A heading and how to show a row under it."""

    heading: str
    show: Callable[[Row], str]


def number(key: str, spec: str) -> Callable[[Row], str]:
    """Show ``row[key]`` in a format specification; an absent value is a dash."""
    return lambda row: "–" if row.get(key) is None else format(row[key], spec)


def spread(key: str, spec: str) -> Callable[[Row], str]:
    """Show ``row[key] ± row[key_sd]``; without a deviation the figure alone."""

    def show(row: Row) -> str:
        figure = number(key, spec)(row)
        return figure if row.get(f"{key}_sd") is None else f"{figure} ± {format(row[f'{key}_sd'], spec)}"

    return show


EVALUATION_COLUMNS = (
    Column("SAE", lambda row: str(row["name"])),
    Column("values", number("num_values", ",")),
    Column("on disk", lambda row: human_bytes(row["num_bytes"])),
    Column("rel. error", number("relative_error", ".3f")),
    Column("FVU", number("fvu", ".3f")),
    Column("L0", number("l0", ".1f")),
    Column("dead", number("dead", ",")),
    Column("CE rec.", number("ce_recovered", ".3f")),
    Column("CE clean", number("ce_clean", ".3f")),
    Column("CE zero", number("ce_zero", ".3f")),
    Column("CE recon.", number("ce_recon", ".3f")),
    Column("FVU, OMP", number("omp_fvu", ".3f")),
    Column("CE rec., OMP", number("omp_ce_recovered", ".3f")),
    Column("train s", number("train_seconds", ",.1f")),
)
"""What an evaluation in the model shows."""


def print_table(rows: Sequence[Row], columns: Sequence[Column], title: str = "") -> None:
    """Print to standard output at full width: a narrow terminal wraps lines, but no figure is cut off."""
    table = Table(title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column.heading, justify="left" if column is columns[0] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(column.show(row) for column in columns))
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(needed, Console().width)).print(table)


def markdown_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The same as Markdown."""
    lines = ["| " + " | ".join(column.heading for column in columns) + " |"]
    lines.append("|---|" + "---:|" * (len(columns) - 1))
    lines += ["| " + " | ".join(column.show(row) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"
