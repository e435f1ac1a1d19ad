"""Pictures: one palette that colour-blind readers can use, labels and points of the frontier."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from support.picture import points

from expander_sae.report import picture
from expander_sae.report.frontier import plot_frontier

# Machado, Oliveira & Fernandes 2009, severity 1, on linear RGB.
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
)
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour: str) -> np.ndarray:
    """CIELAB of a colour as a deuteranope sees it."""
    rgb = np.asarray(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(DEUTERANOPIA @ linear, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def closest(colours: tuple[str, ...]) -> float:
    return min(float(np.linalg.norm(lab(a) - lab(b))) for a, b in itertools.combinations(colours, 2))


def test_the_palette_is_told_apart_under_deuteranopia() -> None:
    assert closest(picture.PALETTE) > 10
    assert closest(("#b04a2f", "#8a6d1d")) < 10  # two of an earlier palette: the check can fail


def test_things_differ_by_marker_and_dash_too() -> None:
    looks = [picture.style(number) for number in range(11)]
    assert len({look.marker for look in looks}) == 11
    assert len({(look.colour, look.dash) for look in looks}) == 11


def test_the_frontier() -> None:
    rows = [
        {"name": name, "num_bytes": size, "fvu": 0.4, "omp_fvu": 0.3, "ce_recovered": 0.8, "omp_ce_recovered": best}
        for name, size, best in (("a", 100, 0.9), ("b", 1000, None))
    ]
    figure = plot_frontier(rows, "Title")
    fvu, ce = figure.axes
    assert {axes.get_xlabel() for axes in (fvu, ce)} == {"bytes on disk"}
    assert points(fvu) == {"a": [[100, 0.4]], "b": [[1000, 0.4]]}
    assert points(ce) == {"a": [[100, 0.8]]}  # nothing recovered to speak of
    hollow = [line for line in fvu.get_lines() if line.get_markerfacecolor() == "white"]
    assert [line.get_xydata().tolist() for line in hollow] == [[[100, 0.3]], [[1000, 0.3]]]
    assert not fvu.texts, "names stand in the legend, where nothing overlaps"
    assert [entry.get_text() for entry in figure.legends[0].get_texts()] == ["a", "b"]


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    picture.save(picture.figure(2, 2), path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")
    broken = picture.figure(2, 2)
    monkeypatch.setattr(broken, "savefig", lambda *args, **kw: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        picture.save(broken, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
