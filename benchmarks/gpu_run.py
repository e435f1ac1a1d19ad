"""What the parts of ``gpu_check.py`` share: the device, its clock and memory, comparisons, and the report."""

from __future__ import annotations

import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expander_sae.mask import Mask

Shape = tuple[int, int, int, int]  # m, n, d, k
SECTIONS = ("check", "encode", "peers", "step", "pursuit")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # ‖found - expected‖ / ‖expected‖


class Run:
    """The whole run: where it happens and what it found."""

    def __init__(self, device: torch.device, out: Path) -> None:
        self.device, self.out = device, out
        self.failures = 0
        self.report: dict[str, Any] = {"environment": environment(device)} | {name: [] for name in SECTIONS}

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
        """Seconds of each turn, by the device's own clock; a rehearsal takes one turn."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            run()
            return [time.perf_counter() - begin]
        for _ in range(3):
            run()
        seconds = []
        for _ in range(turns):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
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


def times(name: str, seconds: list[float], batch: int) -> dict[str, float]:
    median = statistics.median(seconds)
    return {
        f"{name}_ms": round(1e3 * median, 4),
        f"{name}_ms_spread": round(1e3 * (max(seconds) - min(seconds)), 4),
        f"{name}_ns_per_sample": round(1e9 * median / batch, 1),
    }
