"""The benchmarks run, and refuse to time a wrong answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

from benchmarks import checks, encode, idle, memory, peers, public, pursuit, rules, step  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.cases import DEFAULT_SIZES, Shape  # noqa: E402
from benchmarks.measure import Race, Row, Settings  # noqa: E402
from expander_sae.dictionary import ExpanderMatrix  # noqa: E402
from expander_sae.dictionary import matrix as matrix_module  # noqa: E402
from expander_sae.ops import SparseCode  # noqa: E402
from expander_sae.ops.fused import TiedError  # noqa: E402

SIZES = "32x128x3x4"
TINY = Shape.parse(SIZES)
ONCE = Settings(repeats=2, batch=24)
DECODE = ExpanderMatrix.decode


@pytest.fixture(autouse=True)
def _own_process_state():
    """The command sets threads for the process; leave the other tests theirs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


def test_encode_compares_with_both_precisions():
    rows = by_name(encode.run(TINY, ONCE))
    assert rows[encode.OURS].ours
    assert len(rows[encode.OURS].seconds) == ONCE.repeats
    peer = rows["torch matmul + topk, highest precision"]
    assert peer.ratios[encode.OURS] == pytest.approx(peer.per_sample / rows[encode.OURS].per_sample)
    assert "same codes" in peer.note
    assert torch.get_float32_matmul_precision() == "highest"


def test_step_checks_loss_and_gradients():
    rows = by_name(step.run(TINY, ONCE))
    assert rows["dense PyTorch, highest precision"].note == "same loss and gradients"
    assert rows["dense PyTorch, highest precision"].ratios.keys() == {step.OURS, *step.PURSUIT_ENCODERS}


def test_every_rule_is_raced_against_the_same_rule():
    rows = by_name(rules.run(TINY, ONCE))
    for kind in rules.RULES:
        dense = rows[f"dense dictionary, {kind}"]
        assert dense.note == "same loss"
        assert dense.ratios.keys() == {rules.ours(kind)}


def test_a_wrong_loss_of_a_rule_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ExpanderMatrix, "decode", lambda self, code: 1.01 * DECODE(self, code))
    with pytest.raises(checks.WrongAnswer, match="dense dictionary, batch-topk"):
        rules.run(TINY, ONCE)


def test_pursuit_agrees_with_scikit_learn():
    pytest.importorskip("sklearn")
    rows = by_name(pursuit.run(TINY, ONCE))
    assert "same support in 16 of 16" in rows["scikit-learn orthogonal_mp_gram, float64"].note


def test_missing_peers_are_listed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "module", lambda name: None)
    for suite in (step, rules, pursuit):
        rows = suite.run(TINY, ONCE)
        absent = [row for row in rows if row.note == peers.NOT_INSTALLED]
        assert absent
        assert not any(row.seconds or row.ratios for row in absent)


def test_command_prints_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.idle.others", lambda: 0.0)
    path = tmp_path / "out.json"
    arguments = ["encode", "memory", "theory", "--sizes", SIZES, "--repeats", "2", "--batch", "8", "--threads", "1"]
    assert main([*arguments, "--json", str(path)]) == 0
    assert "ours is faster" in capsys.readouterr().out
    saved = json.loads(path.read_text())
    assert saved["settings"] == {"repeats": 2, "threads": 1, "batch": 8}
    assert saved["environment"]["torch"] == torch.__version__
    assert {row["suite"] for row in saved["rows"]} == {"encode", "memory", "theory"}
    child = next(row for row in saved["rows"] if row["name"] == "expander, step")
    if sys.platform == "linux":
        assert child["memory_bytes"] > 50 << 20  # PyTorch alone is more
    text = path.with_suffix(".md").read_text()
    assert "| 32 × 128, d=3, k=4 |" in text
    assert "5000 steps" in text


def test_a_busy_machine_gives_no_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("benchmarks.idle.others", lambda: 0.7)
    path = tmp_path / "out.json"
    assert main(["encode", "--sizes", SIZES, "--json", str(path), "--wait", "1"]) == 2
    assert "0.7 cores busy" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_work_of_other_processes_is_seen():
    spin = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert idle.others(0.5) > 0.3  # type: ignore[operator]
    finally:
        spin.kill()
        spin.wait()


def test_the_public_path_is_timed_against_its_kernel():
    rows = by_name(public.run(TINY, ONCE))
    assert "kernel" in rows["sae.encode"].ratios
    assert "bare step" in rows["train, preset modern"].ratios
    assert rows["train, preset pursuit"].seconds


@pytest.mark.parametrize("arguments", [["speed"], ["--sizes", "32x128"], ["--sizes", "4x8x9x1"], ["--repeats", "0"]])
def test_command_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


def test_default_sizes_parse():
    assert all(Shape.parse(size) for sizes in DEFAULT_SIZES.values() for size in sizes)


def spoil_topk(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[SparseCode], SparseCode]) -> None:
    whole = ExpanderMatrix.select
    monkeypatch.setattr(ExpanderMatrix, "select", lambda *args, **options: spoil(whole(*args, **options)))


SPOILERS: dict[str, Callable[[SparseCode], SparseCode]] = {
    "values are not the scores": lambda code: replace(code, values=code.values * 1.001),
    "a feature is named twice": lambda code: replace(
        code, indices=code.indices[:, :1].expand(-1, code.k), values=code.values[:, :1].expand(-1, code.k)
    ),
}


@pytest.mark.parametrize("fault", [*SPOILERS])
def test_wrong_code_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch):
    spoil_topk(monkeypatch, SPOILERS[fault])
    with pytest.raises(checks.WrongAnswer, match=fault):
        encode.run(TINY, ONCE)


def test_smaller_score_is_caught():
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    code = SparseCode(torch.tensor([[0, 2]], dtype=torch.int32), torch.tensor([[3.0, 1.0]]))
    with pytest.raises(checks.WrongAnswer, match="larger score"):
        checks.same_topk("it", code, scores)


def test_wrong_loss_is_caught(monkeypatch: pytest.MonkeyPatch):
    whole = matrix_module.tied_error

    def larger(*arguments: Any, **options: Any) -> TiedError:
        found = whole(*arguments, **options)
        return found._replace(error=found.error * 1.001)

    monkeypatch.setattr(step, "check_gradients", lambda *_: None)
    monkeypatch.setattr(matrix_module, "tied_error", larger)
    with pytest.raises(checks.WrongAnswer, match="dense PyTorch"):
        step.run(TINY, ONCE)


def test_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch):
    whole = matrix_module.tied_error

    def half(h: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, *rest: Any, **options: Any) -> TiedError:
        return whole(h, rows, (values + values.detach()) / 2, *rest, **options)  # same value, half the gradient

    monkeypatch.setattr(matrix_module, "tied_error", half)
    with pytest.raises(checks.WrongAnswer, match="gradient of the columns"):
        step.run(TINY, ONCE)


@pytest.mark.parametrize("name", ["omp", "matching_pursuit"])
def test_wrong_pursuit_is_caught(name: str, monkeypatch: pytest.MonkeyPatch):
    whole = getattr(pursuit, name)

    def spoiled(h: Any, matrix: Any, k: int, *, backend: str | None = None) -> Any:
        code = whole(h, matrix, k, backend=backend)
        return code if backend == "reference" else replace(code, values=code.values * 1.1)

    monkeypatch.setattr(pursuit, name, spoiled)
    with pytest.raises(checks.WrongAnswer, match="residuals differ"):
        pursuit.run(TINY, ONCE)


def test_command_fails_on_a_wrong_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("benchmarks.__main__._warm_up", lambda: None)
    spoil_topk(monkeypatch, SPOILERS["values are not the scores"])
    assert main(["encode", "--sizes", SIZES, "--batch", "8", "--repeats", "1"]) == 1
    assert "wrong answer" in capsys.readouterr().err


def test_contender_that_needs_too_much_is_skipped():
    race = Race("encode", TINY, ONCE)
    assert race.enter("huge", lambda: pytest.fail("built"), samples=1, needs=1 << 60) is None
    (row,) = race.rows()
    assert row.note.startswith("skipped: needs about")


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_is_the_contender_s():
    def build() -> Callable[[], float]:
        weights = torch.ones(25_000_000)  # 100 MB held
        return lambda: float((weights + 1)[0])  # as much again in passing

    race = Race("encode", TINY, ONCE)
    race.enter("hungry", build, samples=1)
    (row,) = race.rows()
    assert row.memory_bytes is not None
    assert 180e6 < row.memory_bytes < 260e6


def test_child_failure_is_reported(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RuntimeError, match="failed"):
        memory.run(replace(TINY, k=TINY.d_sae + 1), ONCE)
