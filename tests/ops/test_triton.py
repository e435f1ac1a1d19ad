"""The Triton kernels, without a GPU: interpreted against the reference, and compiled for one.

Triton decides at its import whether it interprets, so the cases run in a process of their own. They are skipped only
where triton is not installed (on Linux the ``test`` extra brings it): a triton that does not load is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from expander_sae.ops import triton as kernels

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_cases(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_cases.py")]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


@needs_triton
def test_interpreted() -> None:
    """62 cases in half a minute on one core."""
    run_cases(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu() -> None:
    run_cases(TRITON_INTERPRET="0")


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter knows no types: what it runs need not compile."""
    script = HERE / "compile_triton.py"
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def test_why_not_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    assert not kernels.available(cpu)
    installed = importlib.util.find_spec("triton") is not None
    assert ("TRITON_INTERPRET=1" if installed else "not installed") in kernels.why_not(cpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in kernels.why_not(torch.device("cuda"))
    assert not kernels.available(torch.device("cuda"))
