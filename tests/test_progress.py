"""Progress off a terminal: a plain line every so often with rate and time left; on one, a bar."""

from __future__ import annotations

import re
import time

import pytest

from expander_sae import progress as module
from expander_sae.progress import progress


def test_plain_lines_come_even_while_nothing_advances(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.05)
    with progress("Train it", 1200, "step", done=200) as advance:
        time.sleep(0.12)
        first = capsys.readouterr()
        advance(500, note="FVU 0.5 [now]")
        time.sleep(0.12)
        second = capsys.readouterr()
        advance(500)
    last = capsys.readouterr()
    assert first.out == second.out == last.out == ""
    assert first.err.splitlines()[0] == "Train it: 200 of 1,200, 0 s"
    assert re.search(r"Train it: 700 of 1,200, 0 s, [\d,]+ step/s, 0 s left \(FVU 0\.5 \[now\]\)\n", second.err)
    assert re.fullmatch(
        r"Train it: 1,200 of 1,200, \d+ s, [\d,]+ step/s \(FVU 0\.5 \[now\]\)", last.err.splitlines()[-1]
    )


def test_the_interval_is_ten_seconds() -> None:
    assert module.INTERVAL == 10


def test_an_error_ends_it_with_how_far_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        with progress("It", 10) as advance:
            advance(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert capsys.readouterr().err.startswith("It: 3 of 10, ")


def test_what_is_finished_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("It", 10, done=10) as advance:
        advance(0, note="x")
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress("It [1]", 10) as advance:
        advance(10, note="[/]")
    shown = capsys.readouterr().err
    assert "10/10" in shown
    assert "It [1]" in shown
    assert "━" in shown


@pytest.mark.parametrize(("seconds", "expected"), [(3.4, "3 s"), (99, "99 s"), (125, "2 min 5 s"), (7300, "2 h 1 min")])
def test_durations(seconds: float, expected: str) -> None:
    assert module.duration(seconds) == expected
