"""``gpu_check.py`` without a GPU: its peers by stand-ins, its pursuit part on the CPU, the whole of it interpreted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

from benchmarks import gpu_check, gpu_peers, gpu_pursuit, gpu_run  # noqa: E402
from expander_sae import ops  # noqa: E402
from expander_sae.experiments.block_size import BlockSize  # noqa: E402
from expander_sae.ops import Selection  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
SHAPE = (16, 64, 3, 4)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# Stand-ins with the peers' calling conventions.
AUTHORS = """
import torch

def encoder_forward_v3(tilde_h, values, rows, b_enc, n, d):
    assert tilde_h.dtype == values.dtype == b_enc.dtype == torch.float32 and rows.dtype == torch.int32
    assert values.shape == rows.shape == (n * d,)
    gathered = tilde_h[:, rows.long()].reshape(-1, n, d)
    return (gathered * values.reshape(n, d)).sum(dim=2) + b_enc
"""
FLASH = """
import torch

class SparseAutoencoder(torch.nn.Module):
    def __init__(self, d_model, n_features, k):
        super().__init__()
        self.k = k
        self.W_enc = torch.nn.Parameter(torch.randn(d_model, n_features))
        self.b_enc = torch.nn.Parameter(torch.randn(n_features))
        self.b_pre = torch.nn.Parameter(torch.randn(d_model))

    def encode(self, x):
        found = torch.topk(torch.relu((x - self.b_pre) @ self.W_enc + self.b_enc), self.k)
        return found.values, found.indices, None
"""


def write_peers(folder: Path, authors: str = AUTHORS, flash: str = FLASH) -> Path:
    for path, text in (
        (folder / "a checkout" / gpu_peers.AUTHORS_FILE, authors),
        (folder / "another" / gpu_peers.FLASH_FILE, flash),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[gpu_run.Run]:
    """A run on the CPU whose own encoder is the reference, so that nothing needs triton."""

    def ours(problem: gpu_peers.Problem) -> ops.SparseCode:
        return ops.encode(
            problem.h, problem.rows, problem.values, problem.bias, Selection(problem.k), backend="reference"
        )

    monkeypatch.setattr(gpu_peers.Problem, "ours", ours)
    monkeypatch.setattr(gpu_run, "environment", lambda device: {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "flash_sae", raising=False)
    yield gpu_run.Run(torch.device("cpu"), tmp_path / "out.json")
    sys.modules.pop("flash_sae", None)


def rows_of(run: gpu_run.Run) -> list[dict[str, Any]]:
    saved = json.loads(run.out.read_text())["peers"]
    assert saved == run.report["peers"]
    return saved


def test_peers_that_agree_are_timed(run: gpu_run.Run, tmp_path: Path) -> None:
    gpu_peers.time_peers(run, write_peers(tmp_path / "peers"), [SHAPE], batch=6)
    authors, flash = rows_of(run)
    assert run.failures == 0
    assert authors["same_codes"]
    assert authors["ratio"] == pytest.approx(authors["peer_ms"] / authors["ours_ms"], abs=0.02)
    assert authors["ratio_to_ours_bfloat16"] >= 0  # rounded
    assert flash["same_codes"]
    assert "bfloat16" in flash["case"]
    assert "ratio_to_ours_bfloat16" not in flash


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (AUTHORS.replace("+ b_enc", ""), "not those of its features"),
        (AUTHORS.replace("return (", "return 0 * b_enc + (0 * "), "not those of its features"),
        (AUTHORS + "\n_right = encoder_forward_v3\ndef encoder_forward_v3(*a):\n    return -_right(*a)\n", "not those"),
        (AUTHORS.replace("tilde_h[:,", "tilde_h[:2,"), "indices (2, 4)"),
    ],
)
def test_a_wrong_answer_is_not_timed(run: gpu_run.Run, tmp_path: Path, source: str, message: str) -> None:
    folder = write_peers(tmp_path / "peers", authors=source)
    gpu_peers.time_peers(run, folder, [SHAPE], 6, gpu_peers.PEERS[:1])
    (row,) = rows_of(run)
    assert run.failures == 1
    assert message in row["wrong"]
    assert "peer_ms" not in row


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda i, v: (i.flip(1), v.flip(1)), ""),  # in another order they are the same code
        (lambda i, v: (i[:, :1].expand_as(i), v), "twice"),
        (lambda i, v: (i + 64, v), "outside"),
        (lambda i, v: (i, v * 1.01), "not those"),
        (lambda i, v: (i, v * float("nan")), "not those"),
    ],
)
def test_disagreement(spoil: Callable[..., Any], message: str) -> None:
    problem = small_problem()
    ours = ops.encode(problem.h, problem.rows, problem.values, problem.bias, Selection(problem.k), backend="reference")
    found = gpu_peers.disagreement(spoil(ours.indices.long(), ours.values), ours, problem)
    assert message in found if message else not found


def test_features_that_are_not_the_largest_are_noticed() -> None:
    problem = small_problem()
    arguments = (problem.h, problem.rows, problem.values, problem.bias)
    ours = ops.encode(*arguments, Selection(problem.k), backend="reference")
    more = ops.encode(*arguments, Selection(problem.k + 1), backend="reference")
    late = (more.indices[:, 1:].long(), more.values[:, 1:])
    assert "not the largest" in gpu_peers.disagreement(late, ours, problem)


def small_problem() -> gpu_peers.Problem:
    m, n, d, k = SHAPE
    generator = torch.Generator().manual_seed(0)
    h, values, bias = (torch.randn(*shape, generator=generator) for shape in ((6, m), (n, d), (n,)))
    rows = torch.stack([torch.randperm(m, generator=generator)[:d].sort().values for _ in range(n)])
    return gpu_peers.Problem(h, rows.to(torch.int32), values, bias, k)


def test_missing_peers_say_why(run: gpu_run.Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, reason in ((None, "--peers"), (empty, "in empty or in a folder of it")):
        gpu_peers.time_peers(run, folder, [SHAPE], batch=6)
        for row in rows_of(run)[-2:]:
            assert reason in row["absent"]
            assert not row.keys() & {"peer_ms", "ratio"}
    assert run.failures == 0


@pytest.mark.parametrize(
    "flash", ["raise OSError('no libcuda')", "SparseAutoencoder = None", FLASH.replace("W_enc", "encoder")]
)
def test_a_peer_that_cannot_be_called_is_absent_not_a_failure(run: gpu_run.Run, tmp_path: Path, flash: str) -> None:
    gpu_peers.time_peers(run, write_peers(tmp_path / "peers", flash=flash), [SHAPE], 6, gpu_peers.PEERS[1:])
    (row,) = rows_of(run)
    assert "could not be called" in row["absent"]
    assert run.failures == 0


def test_too_many_scores_for_the_authors_kernel(tmp_path: Path) -> None:
    rows, values = torch.zeros(1 << 20, 1, dtype=torch.int32), torch.zeros(1 << 20, 1)
    problem = gpu_peers.Problem(torch.zeros(2048, 1), rows, values, torch.zeros(1 << 20), 4)
    with pytest.raises(gpu_peers.Absent, match="32 bits"):
        gpu_peers.authors_encoder(write_peers(tmp_path / "peers"), problem)


def test_block_sizes(run: gpu_run.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    size = BlockSize(m=16, n=64, d=3, k=4, batch=8, blocks=(1, 2, 4), repeats=1)
    gpu_pursuit.time_block_sizes(run, size)
    rows = run.report["pursuit"]
    assert run.failures == 0
    assert [row["block"] for row in rows] == [1, 2, 4] * 4
    for one, _, shot in zip(*[iter(rows)] * 3, strict=True):
        assert shot["over_one_shot"] == 1
        assert one["over_one_shot"] == pytest.approx(shot["milliseconds"] / one["milliseconds"])
        assert 0 < one["relative_error"] < shot["relative_error"]

    solve = gpu_pursuit.omp

    def worse(*arguments: Any, block: int, backend: str | None = None) -> Any:
        return solve(*arguments, block=block if backend else 4, backend=backend)

    monkeypatch.setattr(gpu_pursuit, "omp", worse)
    run.report["pursuit"].clear()
    gpu_pursuit.time_block_sizes(run, size)
    wrong = [row for row in run.report["pursuit"] if "wrong" in row]
    assert run.failures == len(wrong) == 8  # L = 1 and 2; L = 4 is what it was turned into
    assert not any("milliseconds" in row for row in wrong)


def test_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", out])
    assert gpu_check.main() == 1
    assert "no CUDA device" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", out, "--peers", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "is not a folder" in capsys.readouterr().err


def rehearse(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """The script as a person runs it, in a process of its own: Triton decides at its import whether it interprets."""
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(out), "--rehearse", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    return done.returncode, json.loads(out.read_text())


@needs_triton
def test_the_script_with_peers(tmp_path: Path) -> None:
    status, report = rehearse(tmp_path, "--only", "peers", "--peers", str(write_peers(tmp_path / "peers")))
    assert status == 0
    assert [row["same_codes"] for row in report["peers"]] == [True, True]


@needs_triton
@pytest.mark.slow
def test_the_whole_script(tmp_path: Path) -> None:
    status, report = rehearse(tmp_path, "--sweep")
    assert status == 0
    assert all(report[section] for section in gpu_run.SECTIONS)
    assert not any("error" in row or "wrong" in row for section in gpu_run.SECTIONS for row in report[section])
