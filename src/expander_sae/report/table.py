"""Results as a readable table: on the terminal and as Markdown, from one list of columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from expander_sae.files import human_bytes

Row = Mapping[str, Any]
DASH = "–"
WIDEST = 7
"""Columns that a table for people may have: more cannot be read, and wrap on a terminal."""


@dataclass(frozen=True)
class Column:
    """A heading and how to show a row under it; ``words`` stand to the left, as in the first column, figures right."""

    heading: str
    show: Callable[[Row], str]
    words: bool = False


def number(key: str, spec: str) -> Callable[[Row], str]:
    """Show ``row[key]`` in a format specification; an absent value is a dash."""
    return lambda row: DASH if row.get(key) is None else format(row[key], spec)


def spread(key: str, spec: str) -> Callable[[Row], str]:
    """Show ``row[key] ± row[key_sd]``; without a deviation the figure alone."""

    def show(row: Row) -> str:
        figure = number(key, spec)(row)
        return figure if row.get(f"{key}_sd") is None else f"{figure} ± {format(row[f'{key}_sd'], spec)}"

    return show


def beside(first: Callable[[Row], str], second: Callable[[Row], str]) -> Callable[[Row], str]:
    """Show ``first (second)``; the first alone where there is no second."""

    def show(row: Row) -> str:
        other = second(row)
        return first(row) if other == DASH else f"{first(row)} ({other})"

    return show


def text(key: str) -> Callable[[Row], str]:
    """Show ``row[key]`` as it is; an absent value is a dash."""
    return lambda row: DASH if row.get(key) is None else str(row[key])


def signs(row: Row) -> str:
    """Whether the codes of the row's SAE may be negative: ``"signed"`` or ``"≥ 0"``."""
    return {True: "signed", False: "≥ 0", None: DASH}[row.get("signed")]


EVALUATION_COLUMNS = (
    Column("SAE", text("name")),
    Column("d_sae, k", lambda row: f"{row['d_sae']:,}, {row['k']}"),
    Column("values, on disk", lambda row: f"{row['num_values']:,}, {human_bytes(row['num_bytes'])}"),
    Column("codes", signs, words=True),
    Column("FVU (OMP)", beside(number("fvu", ".3f"), number("omp_fvu", ".3f"))),
    Column("CE rec. (OMP)", beside(number("ce_recovered", ".3f"), number("omp_ce_recovered", ".3f"))),
    Column("train s", number("train_seconds", ",.1f")),
)
"""What an evaluation in the model shows first."""

EVALUATION_DETAILS = (
    Column("SAE", text("name")),
    Column("encoder", text("encoder"), words=True),
    Column("rel. error (OMP)", beside(number("relative_error", ".3f"), number("omp_relative_error", ".3f"))),
    Column("CE recon. (OMP)", beside(number("ce_recon", ".3f"), number("omp_ce_recon", ".3f"))),
    Column("L0", number("l0", ".1f")),
    Column("dead", number("dead", ",")),
    Column("silent", number("silent", ",")),
)
"""The other facts of an evaluation that differ from SAE to SAE."""


def print_table(rows: Sequence[Row], columns: Sequence[Column], title: str = "") -> None:
    """Print to standard output at full width: a narrow terminal wraps lines, but no figure is cut off."""
    # As Text: square brackets in a name are no markup.
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "collapse_padding": True}
    table = Table(title=Text(title) if title else None, title_justify="left", **look)
    for column in columns:
        align = "left" if column.words or column is columns[0] else "right"
        table.add_column(Text(column.heading), justify=align, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(column.show(row)) for column in columns))
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(needed, Console().width)).print(table)


def markdown_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The same as Markdown; what a cell shows cannot break the table."""
    lines = [_line(column.heading for column in columns)]
    lines.append("|---|" + "".join("---|" if column.words else "---:|" for column in columns[1:]))
    lines += [_line(column.show(row) for column in columns) for row in rows]
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
