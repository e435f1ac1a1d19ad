"""The Triton kernels, without a GPU: interpreted against the reference, and compiled for one.

Triton decides at its import whether it interprets, so the cases run in a process of their own. They are skipped only
where triton is not installed (on Linux the ``test`` extra brings it): a triton that does not load is a failure.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from expander_sae.ops import triton as kernels

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


CASES = HERE / "triton_cases.py"
NAMES = [
    node.name
    for node in ast.parse(CASES.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]

Outcomes = dict[str, list[tuple[str, str]]]
"""Test function of ``triton_cases.py`` to its cases: their names and what went wrong, empty where nothing did."""


def outcomes(folder: Path, **environment: str) -> Outcomes:
    """Run all cases in a process of their own."""
    report = folder / "cases.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(CASES)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert report.exists(), done.stdout[-6000:] + done.stderr[-2000:]
    found: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = "".join(f"{part.tag}: {part.text or part.get('message')}" for part in case if part.tag != "system-out")
        found.setdefault(case.attrib["name"].split("[")[0], []).append((case.attrib["name"], wrong))
    return found


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Every case under the interpreter: half a minute on one core."""
    folder = tmp_path_factory.mktemp("triton")
    return outcomes(folder, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str, interpreted: Outcomes) -> None:
    assert interpreted[name], f"{name} was not run"
    wrong = {case: text[-3000:] for case, text in interpreted[name] if text}
    assert not wrong, wrong


@pytest.fixture(scope="module")
def on_the_gpu(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Every case on the device."""
    return outcomes(tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="0")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_on_the_gpu(name: str, on_the_gpu: Outcomes) -> None:
    wrong = {case: text[-3000:] for case, text in on_the_gpu[name] if text}
    assert on_the_gpu[name]
    assert not wrong, wrong


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
