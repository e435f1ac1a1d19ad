"""The map of a phase transition as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expander_sae.report import picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_phase_transition(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Share of recovered codes over ``δ`` and ``ρ`` with the fitted 10, 50 and 90 % points.

    A row for each ``δ`` has ``delta``, ``rho10``, ``rho50``, ``rho90`` (``None``: no fit), and under ``points`` its
    points of the map, with ``rho`` and ``rate``.
    """
    figure = picture.figure(7.5, 5.6)
    axes = figure.subplots()
    # Rectangles, not a mesh: k is an integer, so that every δ has heights of its own.
    columns = sorted(rows, key=lambda row: row["delta"])
    borders = _borders([row["delta"] for row in columns])
    for row, edges in zip(columns, itertools.pairwise(borders), strict=True):
        column = sorted(row["points"], key=lambda point: point["rho"])
        heights, rates = _borders([point["rho"] for point in column]), [[point["rate"]] for point in column]
        axes.pcolormesh(edges, heights, rates, cmap="viridis", vmin=0, vmax=1, shading="flat")
    fitted = [row for row in columns if row["rho50"] is not None]
    lines = (("rho10", ":", "v", "10 %"), ("rho50", "-", "o", "50 % (logistic fit)"), ("rho90", "--", "^", "90 %"))
    for key, style, marker, label in lines:
        x, y = [row["delta"] for row in fitted], [row[key] for row in fitted]
        axes.plot(x, y, style, color="white", marker=marker, ms=4, label=label)
    axes.set_ylim(0, max(point["rho"] for row in rows for point in row["points"]) * 1.03)
    axes.set_xlabel("δ = m / n")
    axes.set_ylabel("ρ = k / m")
    axes.set_title(title, fontsize=10)
    if fitted:
        axes.legend(loc="upper left", facecolor="0.35", labelcolor="white", framealpha=0.8)
    figure.colorbar(axes.collections[0], ax=axes, label="share of codes recovered")
    return figure


def _borders(centres: Sequence[float]) -> list[float]:
    """Edges halfway between neighbours; the outer ones as far out as the inner ones are in."""
    if len(centres) == 1:
        return [centres[0] * 0.5, centres[0] * 1.5]
    inner = [(a + b) / 2 for a, b in itertools.pairwise(centres)]
    return [max(0.0, 2 * centres[0] - inner[0]), *inner, 2 * centres[-1] - inner[-1]]
