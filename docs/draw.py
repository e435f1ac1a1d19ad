"""Draws ``architecture.svg`` and ``dataflow.svg``: ``python docs/draw.py``. A test compares files and drawings.

Both pictures follow the reader's light or dark colours. Letters are taken to be .62 of their size wide, which no common
sans-serif font exceeds in lower case, so that a label that fits here fits everywhere.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "tests"))

from support.house import SOURCE, floors_built  # noqa: E402

LETTER = 0.62  # width of a letter, in font sizes
LIGHT = {"page": "#ffffff", "floor": "#eef4f8", "line": "#7d9db3", "box": "#1b6ca8", "on": "#ffffff", "ink": "#24323d"}
DARK = {"page": "#0d1117", "floor": "#1a2530", "line": "#5d7c92", "box": "#3d8fcc", "on": "#06121c", "ink": "#d7e2ea"}


def colours(theme: dict[str, str]) -> str:
    """CSS classes of one theme."""
    fills = "".join(f".{name}{{fill:{theme[name]}}}" for name in ("page", "box", "on", "ink"))
    return (
        f"{fills}.floor{{fill:{theme['floor']};stroke:{theme['line']}}}"
        f".arrow{{fill:none;stroke:{theme['line']};stroke-width:2}}.head{{fill:{theme['line']}}}"
    )


def text(x: float, y: float, words: str, size: int, style: str, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" class="{style}" font-size="{size}" text-anchor="{anchor}"'
    return f"<text {place}{weight}>{escape(words)}</text>"


def width_of(words: str, size: int) -> float:
    return len(words) * size * LETTER


def rectangle(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" class="{style}"/>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """The SVG around the parts."""
    style = f"{colours(LIGHT)}@media (prefers-color-scheme:dark){{{colours(DARK)}}}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">'
        f"<title>{escape(title)}</title><style>{style}</style>"
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" class="page"/>', *parts, "</svg>"]) + "\n"


def architecture() -> str:
    """One row for each floor, the roof on top: name, packages, what they know about."""
    left, right, step, tall = 150, 850, 38, 32
    floors = floors_built()[::-1]
    parts = []
    for number, floor in enumerate(floors):
        y = 10 + number * step
        parts.append(text(left - 10, y + 21, floor.name, 14, "ink", "end"))
        parts.append(rectangle(left, y, right - left, tall, "floor"))
        x = left + 12.0
        for entry in floor.entries:
            label = f"{entry}/" if (SOURCE / entry).is_dir() else entry
            width = width_of(label, 13) + 12
            parts.append(rectangle(x, y + 5, width, 22, "box"))
            parts.append(text(x + width / 2, y + 20, label, 13, "on", "middle"))
            x += width + 8
        room = right - 12 - x
        assert width_of(floor.knows, 12) * 0.9 <= room, f"{floor.name!r} says too much for the picture"
        parts.append(text(x + 4, y + 20, floor.knows, 12, "ink"))
    bottom = 10 + len(floors) * step
    parts.append(
        text((left + right) / 2, bottom + 16, "every package imports only from those below it", 12, "ink", "middle")
    )
    return picture(right + 10, bottom + 28, "The packages by floors, the ground at the bottom", parts)


@dataclass(frozen=True)
class Station:
    """A box of the data flow: title, lines below it, and where its upper left corner is."""

    title: str
    lines: tuple[str, ...]
    x: int
    y: int
    solid: bool = False


WIDE, TALL = 196, 92
STATIONS = {
    "text": Station("text", ("files, datasets,", "or the embedded articles"), 10, 10),
    "model": Station("language model", ("stops after the block read", "sinks left out, counted"), 260, 10),
    "store": Station("activation store", ("manifest.json, shards", "with tokens, positions"), 510, 10, solid=True),
    "recipe": Station("recipe", ("preset, file, flags;", "saved as recipe.yaml"), 10, 182),
    "train": Station("training loop", ("dictionary × encoder", "× sparsity rule"), 260, 182),
    "sae": Station("SAE", ("config.json,", "sae.safetensors"), 510, 182, solid=True),
    "heldout": Station("held-out text", ("other documents,", "never other windows"), 10, 354),
    "evaluate": Station("evaluation", ("in the model: clean,", "zeroed, replaced"), 260, 354),
    "report": Station("report", ("results.json, results.md,", "a picture"), 510, 354, solid=True),
}


def dataflow() -> str:
    """Text to model to store; store and recipe to SAE; SAE and held-out text to the report."""
    parts = [
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" class="head"/></marker></defs>'
    ]
    for station in STATIONS.values():
        parts.append(rectangle(station.x, station.y, WIDE, TALL, "box" if station.solid else "floor"))
        ink = "on" if station.solid else "ink"
        middle = station.x + WIDE / 2
        parts.append(text(middle, station.y + 28, station.title, 15, ink, "middle", bold=True))
        for number, line in enumerate(station.lines):
            assert width_of(line, 12) <= WIDE + 8, f"{line!r} does not fit its box"
            parts.append(text(middle, station.y + 52 + 18 * number, line, 12, ink, "middle"))
    for row in (("text", "model", "store"), ("recipe", "train", "sae"), ("heldout", "evaluate", "report")):
        for start, end in ((row[0], row[1]), (row[1], row[2])):
            a, b = STATIONS[start], STATIONS[end]
            parts.append(arrow(f"M{a.x + WIDE + 3},{a.y + TALL / 2:g} H{b.x - 4}"))
    # The two that cross from row to row leave their box below and turn between the rows.
    for start, end in (("store", "train"), ("sae", "evaluate")):
        a, b = STATIONS[start], STATIONS[end]
        turn = a.y + TALL + 40
        parts.append(arrow(f"M{a.x + WIDE / 2:g},{a.y + TALL + 3} V{turn} H{b.x + WIDE / 2:g} V{b.y - 4}"))
    for name, command in (
        ("model", "expander-sae harvest"),
        ("train", "expander-sae train"),
        ("evaluate", "expander-sae evaluate"),
    ):
        station = STATIONS[name]
        below = station.y + TALL + 18
        parts.append(text(station.x + WIDE / 2, below, f"expander-sae {command}", 12, "ink", "middle"))
    return picture(716, 480, "How data flows: text, model, store, trainer, SAE, evaluation, report", parts)


def arrow(path: str) -> str:
    return f'<path d="{path}" class="arrow" marker-end="url(#tip)"/>'


DRAWINGS = {"architecture.svg": architecture, "dataflow.svg": dataflow}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
        print(f"wrote {name}")
