"""What a picture shows, for tests: labels and points, not its size."""

from __future__ import annotations

from matplotlib.axes import Axes


def points(axes: Axes) -> dict[str, list[list[float]]]:
    """The points of every labelled line."""
    return {
        str(line.get_label()): line.get_xydata().tolist()  # type: ignore[union-attr]
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }
