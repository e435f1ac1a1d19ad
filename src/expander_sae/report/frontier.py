"""The storage-fidelity frontier as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expander_sae.report import picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (("fvu", "FVU on held-out text (lower is better)"), ("ce_recovered", "CE recovered (higher is better)"))


def plot_frontier(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """FVU and CE recovered against bytes on disk, a marker and a colour for each SAE.

    A full marker is an SAE under its own encoder, the hollow one joined to it the same dictionary read by OMP.
    ``rows`` are those of :func:`~expander_sae.evaluation.in_model.evaluation_rows`.
    """
    figure, (line,) = picture.panels(2, width=5.8)
    for axes, (key, label) in zip(line, PANELS, strict=True):
        for number, row in enumerate(rows):
            own, best = row[key], row[f"omp_{key}"]
            if own is None or best is None:
                continue
            look = picture.style(number)
            axes.plot([row["num_bytes"]] * 2, [own, best], color=look.colour, linewidth=0.8, zorder=1)
            axes.plot(row["num_bytes"], best, **look.points(hollow=True))
            axes.plot(row["num_bytes"], own, label=row["name"], **look.points())
        axes.set_xscale("log")
        axes.set_xlabel("bytes on disk")
        axes.set_ylabel(label)
        axes.margins(x=0.1, y=0.1)
    picture.legend(figure)
    figure.suptitle(f"{title}; hollow: the same dictionary read by OMP", fontsize=11)
    return figure
