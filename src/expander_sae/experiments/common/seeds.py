"""Figures over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any


def without_seeds(settings: Any) -> dict[str, Any]:
    """What a cell of one seed depends on: seeds may be added to a finished folder. ``settings``: a dataclass."""
    return {name: value for name, value in asdict(settings).items() if name != "seeds"}


def over_seeds(rows: Iterable[Mapping[str, Any]], same: Sequence[str], figures: Sequence[str]) -> list[dict[str, Any]]:
    """One row for all that agree in the columns ``same``: mean and sample deviation (``..._sd``) of the ``figures``.

    A deviation of a single run is ``None``. Other columns are those of the first run.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in same), []).append(row)
    merged = []
    for members in groups.values():
        joined: dict[str, Any] = {key: value for key, value in members[0].items() if key != "seed"}
        joined["runs"] = len(members)
        for figure in figures:
            found = [member[figure] for member in members if member.get(figure) is not None]
            joined[figure] = statistics.fmean(found) if found else None
            joined[f"{figure}_sd"] = statistics.stdev(found) if len(found) > 1 else None
        merged.append(joined)
    return merged
