"""Finished cells are kept, skipped and refused; figures over seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expander_sae.experiments.common.resume import Cells, CellsError
from expander_sae.experiments.common.seeds import over_seeds


def test_a_cell_is_computed_once_even_across_runs(tmp_path: Path) -> None:
    calls: list[str] = []

    def compute(name: str) -> dict[str, str]:
        calls.append(name)
        return {"name": name}

    first = Cells(tmp_path, {"size": (1, 2)})
    assert not first.holds("a")
    assert first.get("a", lambda: compute("a")) == {"name": "a"}
    assert first.get("a", lambda: compute("again")) == {"name": "a"}
    again = Cells(tmp_path, {"size": [1, 2]})
    assert again.holds("a")
    assert again.get("a", lambda: compute("again")) == {"name": "a"}
    assert again.get("b", lambda: compute("b")) == {"name": "b"}
    assert calls == ["a", "b"]
    assert set(json.loads((tmp_path / "cells.json").read_text())["cells"]) == {"a", "b"}


def test_a_cell_follows_what_it_was_computed_from(tmp_path: Path) -> None:
    hashes: list[str | None] = ["one"]
    assert Cells(tmp_path, {}).get("a", lambda: 1, lambda: hashes[-1]) == 1
    assert Cells(tmp_path, {}).get("a", lambda: 2, lambda: hashes[-1]) == 1
    hashes.append("two")
    assert Cells(tmp_path, {}).get("a", lambda: 2, lambda: hashes[-1]) == 2
    hashes.append(None)  # deleted to save room: the result stands
    assert Cells(tmp_path, {}).get("a", lambda: 3, lambda: hashes[-1]) == 2


def test_a_cell_that_fails_is_not_kept(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    cells = Cells(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        cells.get("a", fail)
    assert not Cells(tmp_path, {}).holds("a")


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    Cells(tmp_path, {"size": 1, "seed": 0}).get("a", lambda: 1)
    with pytest.raises(CellsError, match=r"other settings: size was 1 and is 2\. Choose another folder"):
        Cells(tmp_path, {"size": 2, "seed": 0})


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"1.5", b"1.6"),
        lambda data: data.replace(b'"a"', b'"b"'),
        lambda data: b"\xff" + data,
        lambda data: b"[]",
        lambda data: b'{"settings": {}, "cells": {}}',
        lambda data: b"",
    ],
)
def test_a_damaged_file_is_named(damage, tmp_path: Path) -> None:
    Cells(tmp_path, {}).get("a", lambda: 1.5)
    path = tmp_path / "cells.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CellsError, match=r"cells\.json .*elete it to start afresh"):
        Cells(tmp_path, {})


def test_over_seeds() -> None:
    rows = [
        {"name": "a", "seed": 0, "error": 1.0, "kind": "x"},
        {"name": "a", "seed": 1, "error": 2.0, "kind": "x"},
        {"name": "b", "seed": 0, "error": 5.0, "kind": "y"},
        {"name": "c", "seed": 0, "error": None, "kind": "y"},
    ]
    a, b, c = over_seeds(rows, ("name",), ("error",))
    assert a == {"name": "a", "kind": "x", "runs": 2, "error": 1.5, "error_sd": pytest.approx(0.5**0.5)}
    assert (b["error"], b["error_sd"], b["runs"]) == (5.0, None, 1)
    assert (c["error"], c["error_sd"]) == (None, None)
