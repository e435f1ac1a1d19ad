"""The storage-fidelity frontier as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expander_sae import files

_MARKERS = {"expander": ("o", "#1b6ca8"), "dense": ("s", "#b04a2f")}


def plot_frontier(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """FVU and CE recovered against bytes on disk, one point an SAE, as a PNG written atomically.

    ``rows`` have ``name``, ``dictionary``, ``num_bytes``, ``fvu`` and ``ce_recovered``.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = (("fvu", "FVU on held-out text (lower is better)"), ("ce_recovered", "CE recovered (higher is better)"))
    for axes, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for kind, (marker, colour) in _MARKERS.items():
            points = [row for row in rows if row["dictionary"] == kind]
            axes.scatter(
                [p["num_bytes"] for p in points], [p[key] for p in points], marker=marker, color=colour, s=60, label=kind
            )
            for p in points:
                axes.annotate(p["name"], (p["num_bytes"], p[key]), textcoords="offset points", xytext=(6, 6), fontsize=8)
        axes.set_xscale("log")
        axes.set_xlabel("bytes on disk")
        axes.set_ylabel(label)
        axes.margins(x=0.25, y=0.15)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(title)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
