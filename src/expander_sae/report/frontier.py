"""The storage-fidelity frontier as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expander_sae.report import picture

_MARKERS = {"expander": ("o", "#1b6ca8"), "dense": ("s", "#b04a2f")}


def plot_frontier(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """FVU and CE recovered against bytes on disk, as a PNG written atomically.

    A full marker is an SAE under its own encoder, the hollow one joined to it the same dictionary read by OMP.
    ``rows`` are those of :func:`~expander_sae.evaluation.in_model.evaluation_rows`.
    """
    figure = picture.figure(11, 4.6)
    panels = (("fvu", "FVU on held-out text (lower is better)"), ("ce_recovered", "CE recovered (higher is better)"))
    for axes, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for kind, (marker, colour) in _MARKERS.items():
            points = [row for row in rows if row["dictionary"] == kind and row[key] is not None]
            axes.scatter(
                [p["num_bytes"] for p in points],
                [p[key] for p in points],
                marker=marker,
                color=colour,
                s=60,
                label=kind,
            )
            for p in points:
                place, best = p["num_bytes"], p[f"omp_{key}"]
                axes.plot([place, place], [p[key], best], color=colour, linewidth=0.8, zorder=0)
                axes.scatter(place, best, marker=marker, facecolors="white", edgecolors=colour, s=60)
                axes.annotate(p["name"], (place, p[key]), textcoords="offset points", xytext=(7, 5), fontsize=8)
        axes.set_xscale("log")
        axes.set_xlabel("bytes on disk")
        axes.set_ylabel(label)
        axes.margins(x=0.3, y=0.15)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(f"{title}; hollow: the same dictionary read by OMP", fontsize=11)
    picture.save(figure, path)
