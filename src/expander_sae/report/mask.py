"""A mask as a picture: where its entries are, how evenly rows are used, what columns share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from expander_sae.mask import Mask
from expander_sae.report import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS_SHOWN = 256  # of the pattern
_COLUMNS_LINKED = 48  # of the overlap graph


def plot_mask(mask: Mask, title: str) -> Figure:
    """Four panels: entries of evenly spaced columns, row degrees, shared rows of all pairs, overlaps among a few."""
    figure, ((pattern, degrees), (histogram, graph)) = picture.panels(2, 2)
    _pattern(pattern, mask)
    _degrees(degrees, mask)
    _histogram(histogram, mask)
    _graph(graph, mask)
    figure.suptitle(title, fontsize=10)
    return figure


def _pattern(axes: Axes, mask: Mask) -> None:
    chosen = _evenly(mask.d_sae, _COLUMNS_SHOWN)
    row, place = _dense(mask, chosen).nonzero(as_tuple=True)
    axes.plot(chosen[place], row, linestyle="none", marker="s", markersize=1.2, color=picture.PALETTE[0])
    axes.set(xlabel="column", ylabel="row", title=f"entries of {len(chosen)} columns")
    axes.invert_yaxis()


def _degrees(axes: Axes, mask: Mask) -> None:
    degrees = mask.row_degrees()
    axes.plot(degrees, linewidth=0.8, color=picture.PALETTE[0])
    axes.axhline(mask.num_entries / mask.d_in, color=picture.PALETTE[1], linestyle="--", label="mean")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="row", ylabel="columns that use it", title=f"row degrees, {degrees.min()} to {degrees.max()}")
    axes.legend(frameon=False)


def _histogram(axes: Axes, mask: Mask) -> None:
    overlap = mask.overlap()
    axes.bar(range(len(overlap.counts)), overlap.counts, color=picture.PALETTE[0])
    if any(overlap.counts):  # not with a single column
        axes.set_yscale("log")
    axes.set_xticks(range(0, len(overlap.counts), 1 + overlap.maximum // 12))
    axes.set(xlabel="shared rows", ylabel="pairs of columns", title=f"overlap, {overlap.mean:.3g} on average")


def _graph(axes: Axes, mask: Mask) -> None:
    """Columns on a circle; a line where two share rows, as thick as they share many."""
    chosen = _evenly(mask.d_sae, _COLUMNS_LINKED)
    dense = _dense(mask, chosen).float()
    shared = (dense.T @ dense).int().tolist()
    x, y = ([wave(2 * math.pi * i / len(chosen)) for i in range(len(chosen))] for wave in (math.cos, math.sin))
    links = 0
    for i in range(len(chosen)):
        for j in range(i):
            if shared[i][j]:
                width = 0.3 + 2.5 * shared[i][j] / mask.degree
                axes.plot([x[i], x[j]], [y[i], y[j]], color=picture.PALETTE[0], linewidth=width, alpha=0.6, zorder=1)
                links += 1
    axes.plot(x, y, linestyle="none", marker="o", markersize=5, color=picture.PALETTE[1], zorder=2)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title(f"overlap graph of {len(chosen)} columns: {links} of {math.comb(len(chosen), 2)} pairs share rows")


def _evenly(count: int, most: int) -> torch.Tensor:
    """At most ``most`` of ``0 … count - 1``, evenly spaced."""
    return torch.arange(min(count, most)) * count // min(count, most)


def _dense(mask: Mask, columns: torch.Tensor) -> torch.Tensor:
    """bool ``(d_in, len(columns))``."""
    held = None if mask.held is None else mask.held[columns]
    return Mask.from_rows(mask.rows[columns], mask.d_in, held).to_dense()
