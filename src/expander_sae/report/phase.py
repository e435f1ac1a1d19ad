"""The map of a phase transition as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expander_sae.report import picture


def plot_phase_transition(
    cells: Sequence[Mapping[str, Any]], transitions: Sequence[Mapping[str, Any]], path: str | Path, title: str
) -> None:
    """Share of recovered codes over ``δ`` and ``ρ`` with the fitted 10, 50 and 90 % points, a PNG written atomically.

    ``cells`` have ``delta``, ``rho``, ``rate``; ``transitions`` have ``delta``, ``rho10``, ``rho50``, ``rho90``
    (``None``: no fit).
    """
    figure = picture.figure(7.5, 5.6)
    axes = figure.subplots()
    # Rectangles, not a mesh: k is an integer, so that every δ has heights of its own.
    columns = sorted({cell["delta"] for cell in cells})
    borders = _borders(columns)
    for delta, edges in zip(columns, itertools.pairwise(borders), strict=True):
        column = sorted((cell for cell in cells if cell["delta"] == delta), key=lambda cell: cell["rho"])
        heights = _borders([cell["rho"] for cell in column])
        axes.pcolormesh(
            edges, heights, [[cell["rate"]] for cell in column], cmap="viridis", vmin=0, vmax=1, shading="flat"
        )
    fitted = [row for row in transitions if row["rho50"] is not None]
    for key, style in (("rho90", "--"), ("rho50", "-"), ("rho10", "--")):
        label = {"rho50": "50 % (logistic fit)", "rho10": "10 % and 90 %"}.get(key)
        marker = "o" if key == "rho50" else None
        axes.plot(
            [r["delta"] for r in fitted],
            [r[key] for r in fitted],
            style,
            color="white",
            marker=marker,
            ms=4,
            label=label,
        )
    axes.set_ylim(0, max(cell["rho"] for cell in cells) * 1.03)
    axes.set_xlabel("δ = m / n")
    axes.set_ylabel("ρ = k / m")
    axes.set_title(title, fontsize=10)
    if fitted:
        axes.legend(loc="upper left", facecolor="0.35", labelcolor="white", framealpha=0.8)
    figure.colorbar(axes.collections[0], ax=axes, label="share of codes recovered")
    picture.save(figure, path)


def _borders(centres: Sequence[float]) -> list[float]:
    """Edges halfway between neighbours; the outer ones as far out as the inner ones are in."""
    if len(centres) == 1:
        return [centres[0] * 0.5, centres[0] * 1.5]
    inner = [(a + b) / 2 for a, b in itertools.pairwise(centres)]
    return [max(0.0, 2 * centres[0] - inner[0]), *inner, 2 * centres[-1] - inner[-1]]
