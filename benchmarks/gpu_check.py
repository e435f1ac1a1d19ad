"""The Triton kernels on a real GPU, in one call: right answers first, then speed against dense, then a training step.

    PYTHONPATH=src python benchmarks/gpu_check.py gpu.json [--sweep] [--only check encode step]

Run it from the repository root. It builds nothing and needs torch with CUDA, triton, numpy, rich and safetensors. The
JSON is rewritten after every case, so a run that is cut short leaves what it had. Exit status 1 where there is no GPU
or an answer was wrong. ``--rehearse`` runs the whole script on toy sizes, on the CPU under ``TRITON_INTERPRET=1``: its
times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expander_sae import ops
from expander_sae.mask import Mask
from expander_sae.ops import library, reference
from expander_sae.sae import SAE

Shape = tuple[int, int, int, int]  # m, n, d, k

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
OPTIONS: list[dict[str, bool]] = [{}, {"relu": True}, {"magnitude": True}]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # ‖found - expected‖ / ‖expected‖


class Check:
    """The whole run: where it happens and what it found."""

    def __init__(self, device: torch.device, out: Path) -> None:
        self.device, self.out = device, out
        self.failures = 0
        self.report: dict[str, Any] = {"environment": environment(device), "check": [], "encode": [], "step": []}

    def note(self, section: str, entry: dict[str, Any]) -> None:
        self.report[section].append(entry)
        print(section, json.dumps(entry), flush=True)
        self.out.write_text(json.dumps(self.report, indent=1) + "\n")

    @contextmanager
    def guarded(self, section: str, what: str) -> Iterator[None]:
        """One case; whatever it raises is noted and the run goes on."""
        try:
            yield
        except Exception as error:
            self.failures += 1
            traceback.print_exc()
            self.note(section, {"case": what, "error": f"{type(error).__name__}: {error}"[:800]})
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def integers(self, *shape: int, dtype: torch.dtype, seed: int = 0, top: int = 2) -> Tensor:
        """Small integers: sums are exact in any order, so answers must be equal to the bit, ties included."""
        generator = torch.Generator().manual_seed(seed + len(shape))
        return torch.randint(-top, top + 1, shape, generator=generator).to(self.device, dtype)

    def normal(self, *shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)

    def rows(self, m: int, n: int, d: int) -> Tensor:
        return Mask.build("left-regular", d_in=m, d_sae=n, degree=d, seed=1).rows.to(self.device)

    def time(self, run: Callable[[], object], turns: int = 15) -> list[float]:
        """Seconds of each turn, by the device's own clock."""
        for _ in range(3):
            run()
        seconds = []
        for _ in range(turns):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                seconds.append(start.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - begin)
        return seconds

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that one run needs beyond what was allocated before it."""
        if self.device.type != "cuda":
            run()
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kernels(self, run: Callable[[], object]) -> dict[str, float]:
        """Microseconds of each GPU kernel in one run, the longest first."""
        if self.device.type != "cuda":
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
        return {event.key[:60]: round(event.device_time_total, 1) for event in events[:12]}


def environment(device: torch.device) -> dict[str, Any]:
    import triton  # pyright: ignore[reportMissingImports]

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, interpreted",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def equal(found: Any, expected: Any) -> str:
    """Empty when the same to the bit."""
    try:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    except AssertionError as error:
        return str(error).splitlines()[0] + "; " + "; ".join(str(error).splitlines()[2:5])
    return ""


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    """Empty when the relative distance is small; NaN is never small."""
    distance = float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    return "" if distance <= TOLERANCE[dtype] else f"relative distance {distance:.2e}, allowed {TOLERANCE[dtype]:.0e}"


def check_operations(run: Check, cases: list[tuple[int, int, int, int, int]]) -> None:
    triton = library._BACKENDS["triton"]
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
                for options in OPTIONS:
                    found = triton.encode_topk(h, rows, values, bias, k, **options)
                    wrong[f"encode_topk {options}"] = equal(
                        found, reference.encode_topk(h, rows, values, bias, k, **options)
                    )
                few = min(batch, 4) if n * m > 1 << 24 else batch
                calls: dict[str, tuple[Any, ...]] = {
                    "correlate": (h[:few], rows, values),
                    "decode": (indices, code, rows, values, m),
                    "correlate_at": (h, indices, rows, values),
                    "values_grad": (h, indices, code, rows),
                    "gram": (indices[: max(1, (1 << 26) // (k * d) ** 2)], rows, values),
                }
                for operation, arguments in calls.items():
                    answer = getattr(triton, operation)(*arguments)
                    wrong[operation] = equal(answer, getattr(reference, operation)(*arguments))
                    wrong[f"{operation}, twice"] = equal(getattr(triton, operation)(*arguments), answer)
                wrong["encode_topk, random"] = check_random(run, triton, batch, m, n, d, k, dtype, rows)
                finish(run, name, wrong)


def check_random(
    run: Check, triton: Any, batch: int, m: int, n: int, d: int, k: int, dtype: torch.dtype, rows: Tensor
) -> str:
    """Normal data: indices distinct, values those of the indices, and as large as the reference's, place by place."""
    h, values = run.normal(batch, m, dtype=dtype), run.normal(n, d, dtype=dtype, seed=1)
    indices, code = triton.encode_topk(h, rows, values, None, k)
    if bool((indices.sort(dim=1).values.diff(dim=1) == 0).any()):
        return "a feature appears twice"
    found = (indices, code)
    if error := equal(triton.encode_topk(h, rows, values, None, k), found):
        return f"another answer the second time: {error}"
    at = reference.correlate_at(h, indices, rows, values)
    return close(code, at, dtype) or close(code, reference.encode_topk(h, rows, values, None, k)[1], dtype)


def check_hard_inputs(run: Check) -> None:
    """NaN, infinity, rows of zeros (every score tied), strides, another type for the values."""
    triton = library._BACKENDS["triton"]
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
            found, expected = triton.encode_topk(*arguments, **options), reference.encode_topk(*arguments, **options)
            wrong[f"{label} {options}"] = equal(found, expected)
    finish(run, "hard inputs", wrong)


def check_gradients(run: Check, cases: list[tuple[int, int, int, int, int]]) -> None:
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
                    code = ops.encode_topk(h, rows, values, bias, k, backend=backend)
                    recon = ops.decode(code, rows, values, m, backend=backend)
                    at = ops.correlate_at(recon, code.indices, rows, values, backend=backend)
                    ((recon - h).square().sum() + (code.values * at).sum()).backward()
                    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

                found, expected = gradients("triton"), gradients("reference")
                wrong = {leaf: close(found[leaf], expected[leaf], dtype) for leaf in expected}
                finish(run, name, wrong | {"leaves": "" if len(found) == 3 else f"gradients only for {list(found)}"})


def finish(run: Check, name: str, wrong: dict[str, str]) -> None:
    wrong = {what: error for what, error in wrong.items() if error}
    run.failures += len(wrong)
    run.note("check", {"case": name, "right": not wrong, **({"wrong": wrong} if wrong else {})})


def time_encode(run: Check, shapes: list[Shape], batch: int) -> None:
    """bf16: ours against matmul, bias and topk; answers compared where the dense one fits."""
    for m, n, d, k in shapes:
        name = f"m={m} n={n} d={d} k={k} B={batch} bf16"
        with run.guarded("encode", name), torch.no_grad():
            dtype = torch.bfloat16
            rows, h = run.rows(m, n, d), run.normal(batch, m, dtype=dtype)
            values, bias = run.normal(n, d, dtype=dtype, seed=1), 0.1 * run.normal(n, dtype=dtype, seed=2)
            values = values / values.norm(dim=1, keepdim=True)

            def sparse(h=h, rows=rows, values=values, bias=bias, k=k) -> ops.SparseCode:
                return ops.encode_topk(h, rows, values, bias, k, backend="triton")

            begin = time.perf_counter()
            sparse()
            entry: dict[str, Any] = {"case": name, "first_call_s": round(time.perf_counter() - begin, 2)}
            entry |= times("ours", run.time(sparse), batch)
            entry["ours_extra_bytes"] = run.peak(sparse)
            entry["ours_kernels_us"] = run.kernels(sparse)
            run.note("encode", entry | {"stage": "ours"})
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
            weight = reference.to_dense(rows, values, m).contiguous()  # (m, n), the layout torch.matmul likes

            def dense(h=h, weight=weight, bias=bias, k=k) -> torch.return_types.topk:
                return torch.topk(torch.addmm(bias, h, weight), k, dim=1)

            expected = dense().values
            entry |= times("dense", run.time(dense), batch)
            entry["dense_extra_bytes"] = run.peak(dense)
            entry["dense_kernels_us"] = run.kernels(dense)
            entry["ratio"] = round(entry["dense_ms"] / entry["ours_ms"], 2)
            # Dense scores are rounded to bf16 before the selection: compare the selected values.
            entry["values_differ"] = close(sparse().values, expected, dtype)
            run.note("encode", entry)
            del weight, expected


def times(name: str, seconds: list[float], batch: int) -> dict[str, float]:
    median = statistics.median(seconds)
    return {
        f"{name}_ms": round(1e3 * median, 4),
        f"{name}_ms_spread": round(1e3 * (max(seconds) - min(seconds)), 4),
        f"{name}_ns_per_sample": round(1e9 * median / batch, 1),
    }


def sweep_encode(run: Check, shape: Shape, batch: int) -> None:
    """The knobs that were set by counting bytes: samples and scores of a tile, blocks used for the bound."""
    from expander_sae.ops.triton import encode

    m, n, d, k = shape
    rows, h = run.rows(m, n, d), run.normal(batch, m, dtype=torch.bfloat16)
    values = run.normal(n, d, dtype=torch.bfloat16, seed=1)
    shipped = encode.plan(batch, m, n, d, k, 2)
    plans = [shipped]
    for samples in (16, 32, 64):
        for features in (64, 128, 256):
            plans.append(replan(shipped, n, k, samples=samples, features=features))
    plans += [replan(shipped, n, k, stride=stride) for stride in (1, 2, 4, 8) if n // stride >= 8 * k]
    plan = encode.plan
    try:
        for cut in dict.fromkeys(plans):
            with run.guarded("encode", f"sweep {cut}"):
                encode.plan = lambda *_, cut=cut: cut
                seconds = run.time(lambda: library._BACKENDS["triton"].encode_topk(h, rows, values, None, k), turns=9)
                entry = {"sweep": str(cut), "shipped": cut == shipped, "case": f"m={m} n={n} d={d} k={k} B={batch}"}
                run.note("encode", entry | times("ours", seconds, batch))
    finally:
        encode.plan = plan


def replan(cut: Any, n: int, k: int, **changes: int) -> Any:
    from expander_sae.ops.triton import encode

    cut = replace(cut, **changes)
    blocks = -(-n // cut.features)
    parts = min(-(-blocks // cut.stride), -(-4 * k // cut.features))
    return replace(cut, blocks=blocks, parts=parts, capacity=encode.capacity(k, cut.stride))


def time_step(run: Check, shapes: list[Shape], dense_shapes: list[Shape], batch: int) -> None:
    """Forward, backward, clip and Adam as the training loop does them, with peak memory."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes:
            m, n, d, k = shape

            def expander(m=m, n=n, d=d, k=k) -> SAE:
                mask = Mask.build("left-regular", d_in=m, d_sae=n, degree=d, seed=1)
                return SAE.expander(mask, k, relu=True)

            step_case(run, "expander", expander, shape, dtype, batch)
        for m, n, d, k in dense_shapes:
            step_case(run, "dense", lambda m=m, n=n, k=k: SAE.dense(m, n, k=k, untied=True), (m, n, d, k), dtype, batch)


def step_case(run: Check, kind: str, build: Callable[[], SAE], shape: Shape, dtype: torch.dtype, batch: int) -> None:
    m, n, d, k = shape
    with run.guarded("step", f"{kind} {shape} {dtype}"):
        sae = build().to(run.device, dtype)
        optimiser = torch.optim.Adam(sae.parameters(), lr=1e-3, foreach=True)
        h = run.normal(batch, m, dtype=dtype)
        losses: list[Tensor] = []

        def step() -> None:
            _, recon = sae.encode_decode(h)
            loss = (h - recon).square().sum(dim=1).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.detach())

        step()
        entry: dict[str, Any] = {"case": f"{kind} m={m} n={n} d={d} k={k} B={batch} {str(dtype)[6:]}"}
        entry["step_extra_bytes"] = run.peak(step)
        entry |= times("step", run.time(step, turns=10), batch)
        entry["kernels_us"] = run.kernels(step)
        if run.device.type == "cuda":
            entry["peak_bytes_all"] = torch.cuda.max_memory_allocated()
        entry["losses"] = [round(float(loss), 4) for loss in (losses[0], losses[-1])]
        if not losses[-1] < losses[0]:
            run.failures += 1
            entry["error"] = "the loss did not fall"
        run.note("step", entry)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where the JSON goes")
    parser.add_argument("--only", nargs="+", choices=("check", "encode", "step"), default=("check", "encode", "step"))
    parser.add_argument("--sweep", action="store_true", help="also time encode over tile sizes and strides")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, for the CPU under TRITON_INTERPRET=1")
    options = parser.parse_args()
    device = torch.device("cpu" if options.rehearse else "cuda")
    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device: nothing was checked or timed. Run this where torch.cuda.is_available() is true.")
        return 1
    if reason := library._BACKENDS["triton"].why_not(device):  # type: ignore[attr-defined]
        print(f"the Triton kernels cannot run here: {reason}")
        return 1
    run = Check(device, options.out)
    check, gradients, encode, step, dense_step, batch = CHECK, GRADIENTS, ENCODE, STEP, DENSE_STEP, BATCH
    if options.rehearse:
        os.environ[library.BACKEND_VARIABLE] = "triton"
        check, gradients, batch = [(3, 9, 40, 3, 4)], [(3, 9, 40, 2, 3)], 4
        encode = step = dense_step = [(16, 64, 3, 4)]
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
        if "step" in options.only:
            time_step(run, step, dense_step, batch)
    print(f"{run.failures} failures; report in {options.out}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
