"""The demo: its arms and their order, each result shown at once, nothing computed twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from expander_sae.experiments import demo
from expander_sae.experiments.common.subject import Subject
from expander_sae.sae import SAE

SETTINGS = demo.DemoSettings(tokens=0, steps=8, batch_size=50, held_out_windows=2, d_sae=40, k=3, degrees=(4,))


def test_the_arms_are_those_of_the_paper_the_dearest_last() -> None:
    arms = demo.demo_arms(576, demo.DemoSettings())
    assert list(arms) == [
        "expander-d7", "dense-n56", "expander-d7-pursuit", "expander-d30", "dense-n240", "expander-d30-pursuit",
        "dense-n4608",
    ]  # fmt: skip
    assert {arm["dead_after"] for arm in arms.values()} == {192_000}
    assert arms["dense-n56"]["d_sae"] * 576 == 7 * 4608


def test_each_result_is_shown_when_it_is_there_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated: list[str] = []
    real = Subject.evaluate

    def cut(self: Subject, saes: dict[str, SAE], windows: int) -> list:
        (name,) = saes
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        evaluated.append(name)
        return real(self, saes, windows)

    monkeypatch.setattr(Subject, "evaluate", cut)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(SETTINGS, tmp_path)
    shown = capsys.readouterr().err
    assert "  expander-d4: d_sae, k: 40, 3; values, on disk: 160, " in shown
    assert "  dense-n5: " in shown
    assert "  expander-d4-pursuit: " not in shown

    monkeypatch.setattr(Subject, "evaluate", real)
    finding = demo.run_demo(SETTINGS, tmp_path)
    rows = {row["name"]: row for row in finding.rows}
    assert list(rows) == list(demo.demo_arms(32, SETTINGS))
    assert [row["signed"] for row in finding.rows] == [False, False, True, False]
    sae = SAE.from_pretrained(tmp_path / "expander-d4")
    assert sae.metadata["metrics"]["fvu"] == rows["expander-d4"]["fvu"]
    assert sae.metadata["trained_on"]["model"] == "tiny-llama"
    assert "4 SAE folders" in finding.also

    monkeypatch.setattr(Subject, "evaluate", lambda *args: pytest.fail("evaluated again"))
    monkeypatch.setattr(demo, "trained", lambda *args: pytest.fail("trained again"))
    assert demo.run_demo(SETTINGS, tmp_path).rows == finding.rows
    with pytest.raises(ValueError, match="other settings"):
        demo.run_demo(replace(SETTINGS, steps=9), tmp_path)
