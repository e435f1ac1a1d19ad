"""Rows as tables on the terminal, as JSON and as Markdown."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import peers
from benchmarks.measure import Row, Settings
from expander_sae import files
from expander_sae.environment import environment
from expander_sae.ops import cpu
from expander_sae.report.table import Column, markdown_table, print_table

TITLES = {
    "encode": "Encode and select",
    "step": "Training step: forward, backward, clip, Adam",
    "rules": "Training step of each sparsity rule",
    "pursuit": "Pursuit",
    "public": "What users call: the public path against the kernels",
    "memory": "A million features: memory of the whole process",
    "theory": "Certificates: what is proven of a dictionary",
}


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:,.1f} µs"
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _spread(seconds: Sequence[float]) -> str:
    return f"{_time(min(seconds))} … {_time(max(seconds))}"


def _timed(show: Callable[[list[float], int], str]) -> Callable[[Mapping[str, Any]], str]:
    """Show seconds and samples; a dash where nothing was timed."""
    return lambda row: show(row["seconds"], row["samples"]) if row["seconds"] else "–"


def _ratio(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{row['ratios'][name]:,.1f}×" if name in row["ratios"] else "" if row["ours"] else "–"


def columns(rows: Sequence[Row]) -> list[Column]:
    """What a suite's table shows: times per sample, or a step of the whole batch; a ratio for each of ours."""
    per_sample = rows[0].suite in ("encode", "pursuit", "public")
    each = _timed(lambda seconds, samples: _time(median(seconds) / (samples if per_sample else 1)))
    spread = _timed(lambda seconds, samples: _spread([turn / (samples if per_sample else 1) for turn in seconds]))
    mine = list(dict.fromkeys(name for row in rows for name in row.ratios))
    return [
        Column("m × n, d, k", lambda row: row["case"]),
        Column("what", lambda row: row["name"]),
        Column("batch", _timed(lambda _, samples: f"{samples:,}")),
        Column("per sample" if per_sample else "per batch", each),
        Column("min … max", spread),
        Column("samples/s", _timed(lambda seconds, samples: f"{samples / median(seconds):,.0f}")),
        Column("memory", lambda row: "–" if row["memory_bytes"] is None else files.human_bytes(row["memory_bytes"])),
        *(Column(f"{name} is faster" if len(mine) > 1 else "ours is faster", _ratio(name)) for name in mine),
        Column("answer", lambda row: row["note"]),
    ]


def show(suite: str, rows: Sequence[Row]) -> None:
    """Print a suite's table."""
    print_table([asdict(row) for row in rows], columns(rows), TITLES[suite])


def machine(settings: Settings) -> dict[str, Any]:
    """Versions and machine."""
    found = environment() | {"peers": peers.versions(), "cores": os.cpu_count()}
    found["threads"] = settings.threads
    found["instruction_set"] = cpu.instruction_sets()[0] if cpu.available(torch.device("cpu")) else None
    return found


def describe(found: Mapping[str, Any]) -> str:
    """The machine in a line."""
    names = ", ".join(f"{name} {version}" for name, version in found["peers"].items()) or "no peers installed"
    kernels = (
        f"C++ kernels ({found['instruction_set']})" if found["cpu_kernels"] else "the reference path, no C++ kernels"
    )
    busy = found.get("cores_busy_before")
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads used"
        + ("" if busy is None else f", {busy:.2f} cores busy with other work at the start")
        + f"; torch {found['torch']}, expander-sae {found['expander_sae']}, {kernels}; {names}; {found['date']}"
    )


def save(path: Path, rows: Sequence[Row], found: Mapping[str, Any], settings: Settings) -> None:
    """``path`` as JSON, and the tables as Markdown beside it."""
    data = {"environment": dict(found), "settings": asdict(settings), "rows": [asdict(row) for row in rows]}
    files.atomic_write_json(path, data)
    parts = [f"# Benchmarks\n\n{describe(found)}\n"]
    for suite, title in TITLES.items():
        if of_suite := [row for row in rows if row.suite == suite]:
            table = markdown_table([asdict(row) for row in of_suite], columns(of_suite))
            parts.append(f"## {title}\n\n{table}")
    files.atomic_write_bytes(path.with_suffix(".md"), "\n".join(parts).encode())
