"""How every experiment's result is written down: rows, settings, versions and machine, as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expander_sae import files
from expander_sae.environment import environment
from expander_sae.report import picture
from expander_sae.report.table import Column, markdown_table, print_table


@dataclass(frozen=True)
class Finding:
    """What running an experiment gives.

    Attributes:
        rows: of the table, JSON values.
        title: over table and picture.
        notes: under the table, a paragraph each: what is constant, what the words mean.
        facts: more that the result depends on, for ``results.json``.
        also: other things the experiment has put into its folder.
    """

    rows: list[dict[str, Any]]
    title: str
    notes: Sequence[str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    also: Sequence[str] = ()


def conclude(
    folder: Path,
    finding: Finding,
    tables: Sequence[Sequence[Column]],
    settings: Mapping[str, Any],
    draw: picture.Picture,
    picture_name: str,
) -> None:
    """How every experiment ends: files written into ``folder``, first table and notes printed, the files named.

    ``results.json`` has everything, ``results.md`` the tables and notes.
    """
    whole = {
        "title": finding.title,
        "settings": {**settings, **finding.facts},
        "environment": environment(),
        "notes": list(finding.notes),
        "rows": finding.rows,
    }
    files.atomic_write_json(folder / "results.json", whole)
    parts = [f"# {finding.title}", *(markdown_table(finding.rows, columns).rstrip() for columns in tables)]
    files.atomic_write_bytes(folder / "results.md", ("\n\n".join([*parts, *finding.notes]) + "\n").encode())
    picture.save(draw(finding.rows, finding.title), folder / picture_name)
    print_table(finding.rows, tables[0], finding.title)
    print("\n".join(finding.notes))
    *written, last = "results.json", "results.md", picture_name, *finding.also
    print(f"\nWrote {', '.join(written)} and {last} in {folder}.")
