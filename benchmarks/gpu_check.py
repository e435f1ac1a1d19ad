"""The Triton kernels on a real GPU, in one call: right answers first, then speed against dense and against other
projects' encoders, then a training step and block OMP.

    PYTHONPATH=src python benchmarks/gpu_check.py gpu.json [--peers FOLDER] [--sweep] [--only check encode step ...]

Run it from the repository root. It builds nothing and needs what the package needs, and torch with CUDA and triton.
``--peers`` names a folder with checkouts of the peers (``gpu_peers.py`` says which); without it they are listed as
absent. The JSON is rewritten after every case, so a run that is cut short leaves what it had. Exit status 1 where there
is no GPU or an answer was wrong. ``--rehearse`` runs the whole script on toy sizes, on the CPU under
``TRITON_INTERPRET=1``: its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a script: the package is this folder, and its modules' names are not to be top-level ones
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.gpu_peers import time_peers
from benchmarks.gpu_run import SECTIONS, Run, Shape, close, equal
from benchmarks.gpu_speed import sweep_encode, time_encode, time_step
from expander_sae import ops
from expander_sae.ops import Selection, reference, triton
from expander_sae.ops.library import BACKEND_VARIABLE

BATCH = 8192
MILLION: Shape = (2048, 1 << 20, 7, 64)
ENCODE: list[Shape] = [
    (512, 4096, 7, 64),
    (576, 4608, 7, 32),
    (2048, 16384, 7, 64),
    (2048, 16384, 30, 64),
    (2048, 131072, 7, 64),
    MILLION,
]
PEERS: list[Shape] = [(512, 4096, 7, 64), (2048, 16384, 7, 64), (2048, 131072, 7, 64), (2048, 16384, 30, 64)]
STEP: list[Shape] = [(2048, 16384, 7, 64), MILLION]
DENSE_STEP: list[Shape] = [(2048, 16384, 7, 64)]
#  batch, m, n, d, k
CHECK: list[tuple[int, int, int, int, int]] = [
    (0, 64, 128, 3, 4),
    (1, 1, 1, 1, 1),
    (1, 512, 4096, 7, 64),
    (63, 100, 1000, 13, 5),
    (64, 96, 300, 96, 16),  # d = m
    (65, 64, 200, 1, 200),  # d = 1, k = n
    (257, 2048, 16384, 7, 64),
    (130, 2048, 5000, 30, 300),
    (96, 4096, 65536, 7, 32),
    (40, 70_000, 3000, 5, 8),  # rows past 16 bits
    (33, 256, 1 << 20, 7, 64),
]
GRADIENTS: list[tuple[int, int, int, int, int]] = [(65, 64, 500, 3, 5), (130, 256, 2000, 7, 16)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS: list[dict[str, Any]] = [{}, {"threshold": 0.0}, {"magnitude": True}, {"threshold": 2.0, "magnitude": True}]


def check_operations(run: Run, cases: list[tuple[int, int, int, int, int]]) -> None:
    for batch, m, n, d, k in cases:
        for dtype in DTYPES:
            name = f"B={batch} m={m} n={n} d={d} k={k} {str(dtype)[6:]}"
            with run.guarded("check", name):
                rows = run.rows(m, n, d)
                h, values = run.integers(batch, m, dtype=dtype), run.integers(n, d, dtype=dtype, seed=1)
                bias, code = run.integers(n, dtype=dtype, seed=2), run.integers(batch, k, dtype=dtype, seed=3)
                picks = torch.randint(0, n, (batch, k), generator=torch.Generator().manual_seed(4))
                indices = picks.to(run.device, torch.int32)
                wrong: dict[str, str] = {}
                center = run.integers(m, dtype=dtype, seed=4, top=1)
                for options in (*OPTIONS, {"center": center, "threshold": 1.0}):
                    found = triton.encode(h, rows, values, bias, k, **options)
                    wrong[f"encode {sorted(options)} {options.get('threshold')}"] = equal(
                        found, reference.encode(h, rows, values, bias, k, **options)
                    )
                few = min(batch, 4) if n * m > 1 << 24 else batch
                calls: dict[str, tuple[Any, ...]] = {
                    "correlate": (h[:few], rows, values),
                    "decode": (indices, code, rows, values, m),
                    "correlate_at": (h, indices, rows, values),
                    "values_grad": (h, indices, code, rows),
                    "gram": (indices[: max(1, (1 << 26) // (k * d) ** 2)], rows, values, m),
                }
                for operation, arguments in calls.items():
                    answer = getattr(triton, operation)(*arguments)
                    wrong[operation] = equal(answer, getattr(reference, operation)(*arguments))
                    wrong[f"{operation}, twice"] = equal(getattr(triton, operation)(*arguments), answer)
                wrong["encode, random"] = check_random(run, batch, m, n, d, k, dtype, rows)
                finish(run, name, wrong)


def check_random(run: Run, batch: int, m: int, n: int, d: int, k: int, dtype: torch.dtype, rows: Tensor) -> str:
    """Normal data: indices distinct, values those of the indices, and as large as the reference's, place by place."""
    h, values = run.normal(batch, m, dtype=dtype), run.normal(n, d, dtype=dtype, seed=1)
    indices, code = triton.encode(h, rows, values, None, k)
    if bool((indices.sort(dim=1).values.diff(dim=1) == 0).any()):
        return "a feature appears twice"
    found = (indices, code)
    if error := equal(triton.encode(h, rows, values, None, k), found):
        return f"another answer the second time: {error}"
    at = reference.correlate_at(h, indices, rows, values)
    return close(code, at, dtype) or close(code, reference.encode(h, rows, values, None, k)[1], dtype)


def check_hard_inputs(run: Run) -> None:
    """NaN, infinity, rows of zeros (every score tied), strides, another type for the values."""
    m, n, d, k = (24, 200, 3, 5) if run.device.type == "cpu" else (512, 16384, 7, 64)
    rows = run.rows(m, n, d)
    h, values = run.integers(8, m, dtype=torch.float32), run.integers(n, d, dtype=torch.float32, seed=1)
    h[0, 2], h[1, 3], h[2, 4], h[3], h[4] = torch.nan, torch.inf, -torch.inf, 0.0, torch.nan
    bias = run.integers(n, dtype=torch.float32, seed=2)
    bias[7], bias[9], bias[11] = torch.nan, torch.inf, -torch.inf
    strided = run.integers(2 * d, n, dtype=torch.float32, seed=5).T[:, ::2]
    wrong: dict[str, str] = {}
    for options in OPTIONS:
        for label, arguments in {
            "NaN, infinity and ties": (h, rows, values, None, k),
            "a bias of NaN and infinity": (h[5:], rows, values, bias, k),
            "strides": (h[5:].T.contiguous().T, rows, strided, None, k),
            "float32 values, bfloat16 data": (h[5:].bfloat16(), rows, values, None, k),
        }.items():
            found, expected = triton.encode(*arguments, **options), reference.encode(*arguments, **options)
            wrong[f"{label} {options}"] = equal(found, expected)
    finish(run, "hard inputs", wrong)


def check_gradients(run: Run, cases: list[tuple[int, int, int, int, int]]) -> None:
    for batch, m, n, d, k in cases:
        for dtype in DTYPES:
            name = f"gradients B={batch} m={m} n={n} d={d} k={k} {str(dtype)[6:]}"
            with run.guarded("check", name):
                rows = run.rows(m, n, d)

                def gradients(backend: str, b=batch, m=m, n=n, d=d, k=k, dtype=dtype, rows=rows) -> dict[str, Tensor]:
                    leaves = {
                        "h": run.integers(b, m, dtype=dtype, top=1),
                        "values": run.integers(n, d, dtype=dtype, seed=1, top=1),
                        "bias": run.integers(n, dtype=dtype, seed=2, top=1),
                    }
                    h, values, bias = (leaf.requires_grad_() for leaf in leaves.values())
                    code = ops.encode(h, rows, values, bias, Selection(k), backend=backend)
                    recon = ops.decode(code, rows, values, m, backend=backend)
                    at = ops.correlate_at(recon, code.indices, rows, values, backend=backend)
                    ((recon - h).square().sum() + (code.values * at).sum()).backward()
                    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

                found, expected = gradients("triton"), gradients("reference")
                wrong = {leaf: close(found[leaf], expected[leaf], dtype) for leaf in expected}
                finish(run, name, wrong | {"leaves": "" if len(found) == 3 else f"gradients only for {list(found)}"})


def finish(run: Run, name: str, wrong: dict[str, str]) -> None:
    wrong = {what: error for what, error in wrong.items() if error}
    run.failures += len(wrong)
    run.note("check", {"case": name, "right": not wrong, **({"wrong": wrong} if wrong else {})})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where the JSON goes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="a folder with checkouts of the peers")
    parser.add_argument("--sweep", action="store_true", help="also time encode over tile sizes and strides")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, for the CPU under TRITON_INTERPRET=1")
    options = parser.parse_args()
    if options.peers is not None and not options.peers.is_dir():
        parser.error(f"--peers: {options.peers} is not a folder")
    device = torch.device("cpu" if options.rehearse else "cuda")
    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device: nothing was checked or timed. Run this where torch.cuda.is_available() is true.")
        return 1
    if reason := triton.why_not(device):
        print(f"the Triton kernels cannot run here: {reason}")
        return 1
    run = Run(device, options.out)
    check, gradients, encode, peers, step, dense_step = CHECK, GRADIENTS, ENCODE, PEERS, STEP, DENSE_STEP
    batch = BATCH
    if options.rehearse:
        os.environ[BACKEND_VARIABLE] = "triton"
        check, gradients, batch = [(3, 9, 40, 3, 4)], [(3, 9, 40, 2, 3)], 4
        encode = peers = step = dense_step = [(16, 64, 3, 4)]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if "check" in options.only:
            check_operations(run, check)
            with run.guarded("check", "hard inputs"):
                check_hard_inputs(run)
            check_gradients(run, gradients)
        if "encode" in options.only:
            time_encode(run, encode, batch)
            if options.sweep:
                sweep_encode(run, encode[0] if options.rehearse else ENCODE[2], batch)
        if "peers" in options.only:
            time_peers(run, options.peers, peers, batch)
        if "step" in options.only:
            time_step(run, step, dense_step, batch)
        if "pursuit" in options.only:
            with run.guarded("pursuit", "block sizes"):
                pursue(run, rehearse=options.rehearse)
    print(f"{run.failures} failures; report in {options.out}")
    return 1 if run.failures else 0


def pursue(run: Run, *, rehearse: bool) -> None:
    # Imported late: it brings in the experiments, and a machine that lacks what they need can still do the rest.
    from benchmarks.gpu_pursuit import time_block_sizes
    from expander_sae.experiments.block_size import BlockSize

    toy = BlockSize(m=16, n=64, d=3, k=4, batch=4, blocks=(1, 2, 4), repeats=1)
    time_block_sizes(run, toy if rehearse else BlockSize())


if __name__ == "__main__":
    raise SystemExit(main())
