"""Run the kernels over edge cases on exactly sized buffers; for a sanitizer build, in a process without torch."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np


def load(path: str):
    spec = importlib.util.spec_from_file_location("_kernels", Path(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def at(array: np.ndarray) -> int:
    return array.ctypes.data


def pursue(kernels, sizes: tuple[int, ...], h: np.ndarray, rows: np.ndarray, values: np.ndarray, threads: int) -> None:
    """Every pursuit kernel under every option; columns made unit, one of them zero and two of them equal."""
    B, _, n, _, k = sizes
    values = values.copy()
    values[0] = 0
    if n > 2:
        rows[2], values[2] = rows[1], values[1]
    norms = np.linalg.norm(values, axis=1).astype(np.float32)
    norms[norms == 0] = 1
    values = (values / norms[:, None]).astype(np.float32)
    flags = (False, True)
    runs = [("omp", (block, disjoint)) for block in sorted({1, min(8, k), k}) for disjoint in flags]
    runs += [("matching_pursuit", (reselect, refit)) for reselect in flags for refit in flags]
    for (name, options), nonnegative, tol in itertools.product(runs, flags, (-1.0, 0.3)):
        if name == "omp" and nonnegative and k > 100:
            continue  # minutes under a sanitizer
        # Held to the end of the call, and zero as the caller makes them.
        indices, used, rounds = np.zeros((B, k), np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32)
        code, left = np.zeros((B, k), np.float32), np.zeros(B, np.float32)
        arrays = (h, rows, values, norms, indices, code, left, rounds, used)
        getattr(kernels, name)(*map(at, arrays), *sizes, tol, nonnegative, nonnegative, *options, threads)
        assert B == 0 or (used.max() <= min(k, n) and indices.min() >= 0 and indices.max() < n)
        assert np.isfinite(code).all()


def main(path: str) -> None:
    kernels = load(path)
    random = np.random.default_rng(0)
    shapes = [  # B, m, n, d, k
        (0, 3, 5, 2, 2),
        (1, 1, 1, 1, 1),
        (1, 7, 4097, 3, 33),
        (3, 5, 9000, 2, 10),
        (15, 16, 40, 16, 40),
        (17, 33, 400, 5, 399),
        (63, 20, 700, 3, 64),
        (64, 31, 1000, 4, 7),
        (65, 48, 5000, 7, 65),
        (130, 17, 333, 2, 1),
        (20, 8, 3000, 1, 700),
    ]
    fills = ["normal", "zero", "nan", "inf"]
    cases = 0
    for isa, (B, m, n, d, k), dtype, fill, threads in itertools.product(
        kernels.isas(), shapes, range(4), fills, (1, 3)
    ):
        assert kernels.use_isa(isa)
        kind = [np.float32, np.uint16, np.float16, np.float64][dtype]
        wide = np.float64 if dtype == 3 else np.float32
        h = random.standard_normal((B, m)).astype(np.float32)
        if fill == "zero":
            h[:] = 0
        elif fill != "normal":
            h[::2, ::2] = np.nan if fill == "nan" else np.inf
        h = (h.view(np.uint32) >> 16).astype(np.uint16) if dtype == 1 else h.astype(kind)
        rows = np.sort(np.argsort(random.random((n, m)), axis=1)[:, :d], axis=1).astype(np.int32).copy()
        values = random.standard_normal((n, d)).astype(wide)
        b_enc, b_dec = random.standard_normal(n).astype(wide), random.standard_normal(m).astype(wide)
        indices, code = np.empty((B, k), np.int32), np.empty((B, k), kind)
        sizes, shape = (B, m, n, d, k), (B, m, n, d)
        # Held to the end of the case: an address does not keep its array alive.
        z, recon, at_code = np.empty((B, n), kind), np.empty((B, m), kind), np.empty((B, k), kind)
        grad, pairs = np.empty((n, d), wide), np.empty((B, k, k), kind)
        for relu, magnitude in ((False, False), (True, True)):
            kernels.encode_topk(
                at(h), at(rows), at(values), at(b_enc), at(indices), at(code), *sizes, dtype, relu, magnitude, threads
            )
            assert B == 0 or (indices.min() >= 0 and indices.max() < n)
        kernels.correlate(at(h), at(rows), at(values), at(z), *shape, dtype, threads)
        rest = (*sizes, dtype, threads)
        kernels.decode(0, at(indices), at(code), at(rows), at(values), at(recon), *rest)
        kernels.correlate_at(at(h), at(indices), 0, at(rows), at(values), at(at_code), *rest)
        kernels.values_grad(at(h), at(indices), at(code), at(rows), 0, at(grad), *rest)
        kernels.gram(0, at(indices), 0, at(rows), at(values), at(pairs), B, 0, n, d, k, dtype, threads)
        if B:
            outs = [np.empty(s, wide) for s in ((B, k), (B, m), (B,), (n, d), (n,), (m,))]
            kernels.train_step(
                *map(at, (h, rows, values, b_enc, b_dec, indices, *outs)), *sizes, dtype, fill == "normal", threads
            )
            broken = indices.copy()
            broken[-1, -1] = n
            for name in ("decode", "correlate_at", "values_grad"):
                out = np.empty((max(B, n), max(m, k, d)), np.float64)
                try:
                    getattr(kernels, name)(at(h), at(broken), at(code), at(rows), at(values), at(out), *rest)
                except IndexError:
                    continue
                raise AssertionError(f"{name} took an index out of range")
        if dtype == 0:
            pursue(kernels, sizes, h, rows, values, threads)
        cases += 1
    print(cases, "cases")


if __name__ == "__main__":
    main(sys.argv[1])
