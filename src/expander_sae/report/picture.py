"""Making and saving pictures: matplotlib without a window system or global state, one palette for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expander_sae import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = Callable[[Sequence[Any], str], "Figure"]
"""Draws rows under a title."""

# Okabe and Ito's colours, but yellow (too faint on white): told apart under every common colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))

PER_SAMPLE = "microseconds per sample"


@dataclass(frozen=True)
class Style:
    """How one thing looks in a picture: by colour, by marker and by dash, so that no colour has to be told apart."""

    colour: str
    marker: str
    dash: Any

    def line(self) -> dict[str, Any]:
        """For ``Axes.plot`` and ``Axes.errorbar``."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dash, "markersize": 5}

    def points(self, *, hollow: bool = False) -> dict[str, Any]:
        """For ``Axes.plot`` without a line."""
        face = "white" if hollow else self.colour
        return self.line() | {"linestyle": "none", "markersize": 7, "markerfacecolor": face}


def style(number: int) -> Style:
    """The look of the ``number``-th thing; the periods have no common factor, so that few are ever alike."""
    return Style(PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)])


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # not pyplot, and not before it is needed

    return Figure(figsize=(width, height), layout="constrained")


def panels(columns: int, rows: int = 1, *, width: float = 5.5, height: float = 4.6) -> tuple[Figure, list[list[Axes]]]:
    """A figure of ``rows × columns`` panels with a faint grid, each of that size in inches."""
    picture = figure(width * columns, height * rows)
    axes = picture.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.grid(alpha=0.3)
    return picture, axes.tolist()


def legend(picture: Figure, title: str = "") -> None:
    """One legend to the right of all panels, every label once: beside the points nothing can overlap."""
    handles: dict[str, Any] = {}
    for axes in picture.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    picture.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, title=title or None)


def save(picture: Figure, path: str | Path) -> None:
    """Write the PNG atomically."""
    with files.atomic_path(path) as temporary:
        picture.savefig(temporary, format="png", dpi=130)
