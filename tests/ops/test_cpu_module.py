"""The extension as a guest in a process: absent, forked, called from several threads, under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.kernels import problem, threads

from expander_sae.ops import cpu

ROOT = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(not cpu.available(), reason="the C++ kernels are not built")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_without_the_extension_one_warning_and_the_reference() -> None:
    code = """
import sys, warnings
sys.modules["expander_sae._kernels"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from expander_sae import ops
    from expander_sae.ops import Selection
    from expander_sae.ops import cpu
    rows = torch.tensor([[0], [1], [2]], dtype=torch.int32)
    code = ops.encode(torch.tensor([[1., 3., 2.]]), rows, torch.ones(3, 1), None, Selection(2))
assert code.indices.tolist() == [[1, 2]], code
ours = [w for w in caught if "C++ kernels" in str(w.message)]
assert len(ours) == 1 and ours[0].category is RuntimeWarning, caught
assert "compiler" in str(ours[0].message)
assert not cpu.available() and "not in this installation" in cpu.why_not(torch.device("cpu"))
try:
    cpu.correlate(torch.ones(1, 3), rows, torch.ones(3, 1))
except RuntimeError as error:
    assert "not in this installation" in str(error)
else:
    raise AssertionError("no error")
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@needs_kernels
def test_runs_on_the_openmp_pool_of_torch() -> None:
    if sys.platform != "linux":
        pytest.skip("only there torch brings an OpenMP runtime with GOMP_parallel")
    assert cpu._module().parallel_runtime() == "openmp"


@needs_kernels
def test_works_in_a_forked_child() -> None:
    """libgomp hangs in a child forked after the parent used it; the kernels must not."""
    code = """
import os, signal, torch
from expander_sae.ops import cpu
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
h, values = torch.randn(300, 64, generator=g), torch.randn(2000, 5, generator=g)
rows = torch.randint(0, 64, (2000, 5), generator=g, dtype=torch.int32)
expected = cpu.encode(h, rows, values, None, 20)
child = os.fork()
if child == 0:
    signal.alarm(60)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)  # the kernels start threads of their own
    found = cpu.encode(h, rows, values, None, 20)
    os._exit(0 if torch.equal(found[0], expected[0]) and cpu._module().parallel_runtime() == "std::thread" else 3)
assert os.waitpid(child, 0)[1] == 0
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


IN_A_CHILD = """
import multiprocessing, os, signal, sys, torch
from expander_sae.ops import Selection, dense, encode, fused

torch.set_num_threads({threads})
g = torch.Generator().manual_seed(0)
h, weight = torch.randn(3000, 64, generator=g), torch.randn(2000, 64, generator=g)
values = torch.randn(2000, 5, generator=g)
rows = torch.rand(2000, 64, generator=g).topk(5, dim=1).indices.sort(dim=1).values.int()

def work():
    codes = [encode(h, rows, values, None, Selection(20)), dense.encode(h, weight, None, Selection(20))]
    learned = [tensor.requires_grad_() for tensor in (values.clone(), torch.zeros(2000), torch.zeros(64))]
    optimizer = torch.optim.Adam(learned)
    for _ in range(2):
        optimizer.zero_grad()
        fused.tied_error(h, rows, *learned, Selection(20)).error.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    return [*(code.values for code in codes), *(tensor.detach() for tensor in learned)]

expected = work()

def child():
    signal.alarm(100)
    found = work()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    os._exit(0)
{start}
"""


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("how", ["fork", "multiprocessing"])
def test_encodes_and_trains_in_a_forked_child(how: str, count: int) -> None:
    """PyTorch's own operators hang or crash in a child of a process that ran them with several threads."""
    start = {
        "fork": """
number = os.fork()
if number == 0:
    child()
sys.exit(os.waitpid(number, 0)[1] != 0)
""",
        "multiprocessing": """
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
sys.exit(process.exitcode != 0)
""",
    }[how]
    done = run_python(IN_A_CHILD.format(threads=count, start=start))
    assert done.returncode == 0, done.stderr


@needs_kernels
def test_called_from_several_threads_at_once() -> None:
    p = problem(200, 50, 2000, 5, 8, whole=False)
    with threads(2):
        expected = cpu.encode(p.h, p.rows, p.values, p.b_enc, 30)
        gradient = cpu.values_grad(p.h, p.indices, p.code, p.rows)
        wrong: list[int] = []

        def work(number: int) -> None:
            for _ in range(10):
                found = cpu.encode(p.h, p.rows, p.values, p.b_enc, 30)
                if not torch.equal(found[0], expected[0]) or not torch.equal(
                    cpu.values_grad(p.h, p.indices, p.code, p.rows), gradient
                ):
                    wrong.append(number)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


@needs_kernels
def test_memory_stays_far_below_the_dense_scores() -> None:
    """All scores of this batch would be 1 GiB; the kernels may use lists and tiles only."""
    code = """
import resource, torch
from expander_sae.ops import cpu
torch.set_num_threads(2)
batch, m, n = 2048, 64, 131072
h, values = torch.randn(batch, m), torch.randn(n, 2)
rows = torch.randint(0, m, (n, 2), dtype=torch.int32)
cpu.encode(h[:64], rows, values, None, 32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cpu.encode(h, rows, values, None, 32)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
assert grown < 16, f"{grown} MiB"
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def configure(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}", *options],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")


@needs_cmake
def test_without_a_compiler_cmake_builds_nothing(tmp_path: Path) -> None:
    done = configure(tmp_path, CXX="no-such-compiler", CC="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found" in done.stderr
    built = subprocess.run(
        ["cmake", "--build", str(tmp_path)], capture_output=True, text=True, timeout=600, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert not list(tmp_path.glob("**/_kernels*"))


@pytest.mark.slow
@needs_cmake
@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ and its sanitizers")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """Every operation over edge cases on every instruction set, under ASan and UBSan."""
    done = configure(tmp_path, "-DEXPANDER_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=RelWithDebInfo", CXX="g++")
    assert done.returncode == 0, done.stderr
    built = subprocess.run(
        ["cmake", "--build", str(tmp_path), "-j2"], capture_output=True, text=True, timeout=1800, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (library,) = tmp_path.glob("_kernels*.so")
    preload = " ".join(
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    )
    driver = Path(__file__).with_name("sanitizer_driver.py")
    run = subprocess.run(
        [sys.executable, str(driver), str(library)],
        env=os.environ
        | {
            "LD_PRELOAD": preload,
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc",
        },
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-8000:]
    assert "cases" in run.stdout
