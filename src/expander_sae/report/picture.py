"""Making and saving pictures: matplotlib without a window system or global state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from expander_sae import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # not pyplot, and not before it is needed

    return Figure(figsize=(width, height), layout="constrained")


def save(picture: Figure, path: str | Path) -> None:
    """Write the PNG atomically."""
    with files.atomic_path(path) as temporary:
        picture.savefig(temporary, format="png", dpi=130)
