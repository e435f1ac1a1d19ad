"""The pictures of the architecture are those that ``docs/draw.py`` draws now, and their labels do not overlap."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path

import pytest
from support.house import ROOT, floors_built
from support.pages import script

SVG = "{http://www.w3.org/2000/svg}"
DRAW = script("draw.py")


@pytest.mark.parametrize("name", DRAW.DRAWINGS)
def test_the_file_is_the_drawing(name: str) -> None:
    assert Path(ROOT / "docs" / name).read_text(encoding="utf-8") == DRAW.DRAWINGS[name](), "run python docs/draw.py"


def labels(name: str) -> list[tuple[str, float, float, float, float]]:
    """Words, left, right, top, bottom of every label."""
    found = []
    for text in ElementTree.fromstring(DRAW.DRAWINGS[name]()).iter(f"{SVG}text"):
        words, size = str(text.text), int(text.attrib["font-size"])
        wide, x, y = DRAW.width_of(words, size), float(text.attrib["x"]), float(text.attrib["y"])
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[text.attrib["text-anchor"]]
        found.append((words, left, left + wide, y - size * 0.8, y + size * 0.25))
    return found


@pytest.mark.parametrize("name", DRAW.DRAWINGS)
def test_labels_neither_overlap_nor_leave_the_picture(name: str) -> None:
    root = ElementTree.fromstring(DRAW.DRAWINGS[name]())
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for a, b in combinations(labels(name), 2):
        apart = a[2] <= b[1] or b[2] <= a[1] or a[4] <= b[3] or b[4] <= a[3]
        assert apart, (a[0], b[0])
    for words, left, right, top, bottom in labels(name):
        assert left >= 0, words
        assert right <= width, words
        assert top >= 0, words
        assert bottom <= height, words


def test_every_package_is_drawn() -> None:
    words = {label[0].removesuffix("/") for label in labels("architecture.svg")}
    assert {entry for floor in floors_built() for entry in floor.entries} <= words
