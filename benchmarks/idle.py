"""Is anybody else at work? Threads that wait for each other make a background load count many times over."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

QUIET = 0.1  # cores that others may use


def others(seconds: float = 1.0) -> float | None:
    """Cores that other processes kept busy over the next ``seconds``; ``None`` off Linux."""
    before = _ticks()
    if before is None:
        return None
    own, began = time.process_time(), time.perf_counter()
    time.sleep(seconds)
    after = _ticks()
    assert after is not None
    busy = (after - before) / os.sysconf("SC_CLK_TCK") - (time.process_time() - own)
    return max(0.0, busy / (time.perf_counter() - began))


def wait(limit: float) -> float | None:
    """Wait up to ``limit`` seconds until others use next to nothing; returns the cores they use in the end."""
    deadline = time.monotonic() + limit
    while True:
        found = others()
        if found is None or found <= QUIET or time.monotonic() >= deadline:
            return found


def _ticks() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(fields) - fields[3] - fields[4]  # all but idle and waiting for a disk
    return None
