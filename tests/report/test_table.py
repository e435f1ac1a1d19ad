"""Tables: what a cell shows cannot break them, and they fit a screen."""

from __future__ import annotations

import pytest

from expander_sae.report.table import (
    EVALUATION_COLUMNS,
    EVALUATION_DETAILS,
    WIDEST,
    Column,
    beside,
    markdown_table,
    number,
    print_table,
    signs,
    spread,
    text,
)

ROW = {
    "name": "expander-d30-pursuit", "encoder": "matching-pursuit", "d_sae": 4608, "k": 32, "num_values": 5_308_416,
    "num_bytes": 21_254_400, "signed": True, "fvu": 0.2468, "omp_fvu": 0.2418, "ce_recovered": 0.948,
    "omp_ce_recovered": 0.95, "train_seconds": 268.05, "relative_error": 0.3326, "omp_relative_error": 0.3292,
    "ce_recon": 3.7, "omp_ce_recon": 3.686, "l0": 32.0, "dead": 0, "silent": None,
}  # fmt: skip


def test_how_figures_are_shown() -> None:
    row = {"a": 1234.5, "b": 0.5, "b_sd": 0.25, "none": None}
    assert number("a", ",.0f")(row) == "1,234"
    assert number("none", ".3f")(row) == number("absent", ".3f")(row) == text("absent")(row) == "–"
    assert (spread("b", ".2f")(row), spread("a", ".1f")(row)) == ("0.50 ± 0.25", "1234.5")
    assert beside(number("a", ".0f"), number("b", ".1f"))(row) == "1234 (0.5)"
    assert beside(number("a", ".0f"), number("none", ".1f"))(row) == "1234"
    assert [signs({"signed": value}) for value in (True, False, None)] == ["signed", "≥ 0", "–"]


def test_markdown_is_escaped_and_aligned() -> None:
    columns = [Column("|S|", text("a")), Column("what", text("b"), words=True), Column("figure", text("c"))]
    table = markdown_table([{"a": "x|y", "b": "two\nlines", "c": 1}], columns)
    assert table == "| \\|S\\| | what | figure |\n|---|---|---:|\n| x\\|y | two lines | 1 |\n"


@pytest.mark.parametrize("columns", [EVALUATION_COLUMNS, EVALUATION_DETAILS])
def test_an_evaluation_fits_a_hundred_columns(
    columns: tuple[Column, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(columns) <= WIDEST
    monkeypatch.setenv("COLUMNS", "40")
    print_table([ROW], columns)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert any(("expander-d30-pursuit" in line and "0.3" in line) or "0.247 (0.242)" in line for line in lines)


def test_size_and_sign_can_be_seen() -> None:
    shown = " ".join(column.show(ROW) for column in EVALUATION_COLUMNS)
    for fact in ("4,608, 32", "5,308,416, 20.3 MiB", "signed", "0.247 (0.242)", "0.948 (0.950)"):
        assert fact in shown


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([{"a": "[red]x[/red] [/]"}], [Column("[bold]", text("a"))], "Of [1]")
    shown = capsys.readouterr().out
    assert "[red]x[/red] [/]" in shown
    assert "[bold]" in shown
    assert "Of [1]" in shown
