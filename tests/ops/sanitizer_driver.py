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
    runs = [("omp", {"block": block, "disjoint": one}) for block in sorted({1, min(8, k), k}) for one in flags]
    runs += [("matching_pursuit", {"reselect": one, "refit": other}) for one in flags for other in flags]
    for (name, options), nonnegative, tol in itertools.product(runs, flags, (-1.0, 0.3)):
        if name == "omp" and nonnegative and k > 100:
            continue  # minutes under a sanitizer
        # Held to the end of the call, and zero as the caller makes them.
        indices, used, rounds = np.zeros((B, k), np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32)
        code, left = np.zeros((B, k), np.float32), np.zeros(B, np.float32)
        arrays = {"h": h, "rows": rows, "values": values, "norms": norms, "indices": indices, "code": code}
        arrays |= {"residual_norms": left, "iterations": rounds, "used": used}
        given = {key: at(array) for key, array in arrays.items()} | dict(zip("Bmndk", sizes, strict=True)) | options
        getattr(kernels, name)(**given, tol=tol, positive=nonnegative, nonnegative=nonnegative, threads=threads)
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
        sizes = {"B": B, "m": m, "n": n, "d": d, "k": k, "dtype": dtype, "threads": threads}
        shape = {name: size for name, size in sizes.items() if name != "k"}
        # Held to the end of the case: an address does not keep its array alive.
        z, recon, at_code = np.empty((B, n), kind), np.empty((B, m), kind), np.empty((B, k), kind)
        grad, pairs = np.empty((n, d), wide), np.empty((B, k, k), kind)
        matrix = {"rows": at(rows), "values": at(values)}
        for center, threshold, magnitude in ((0, -np.inf, False), (at(b_dec), 0.0, True)):
            options = {"center": center, "threshold": threshold, "magnitude": magnitude, "b_enc": at(b_enc)}
            out = {"out_indices": at(indices), "out_values": at(code)}
            finite = kernels.encode(h=at(h), **matrix, **out, **options, **sizes)
            assert B == 0 or finite == (fill in ("normal", "zero"))
            assert B == 0 or (indices.min() >= 0 and indices.max() < n)
        kernels.correlate(h=at(h), **matrix, out=at(z), **shape)
        named = {"h": at(h), "indices": at(indices), "code": at(code), **matrix}
        kernels.decode(**named, out=at(recon), **sizes)
        kernels.correlate_at(**named, out=at(at_code), **sizes)
        kernels.values_grad(**named, out=at(grad), **sizes)
        kernels.gram(**named, out=at(pairs), **sizes)
        if B:
            shapes_out = {"code": (B, k), "residual": (B, m), "errors": (B,)}
            shapes_out |= {"grad_values": (n, d), "grad_b_enc": (n,), "grad_b_dec": (m,)}
            outs = {name: np.empty(size, wide) for name, size in shapes_out.items()}
            given = {"h": at(h), **matrix, "b_enc": at(b_enc), "b_dec": at(b_dec), "indices": at(indices)}
            threshold = 0.0 if fill == "normal" else -np.inf
            out = {name: at(array) for name, array in outs.items()}
            kernels.train_step(**given, **out, threshold=threshold, magnitude=False, **sizes)
            broken = indices.copy()
            broken[-1, -1] = n
            for name in ("decode", "correlate_at", "values_grad"):
                out = np.empty((max(B, n), max(m, k, d)), np.float64)
                try:
                    getattr(kernels, name)(**named | {"indices": at(broken)}, out=at(out), **sizes)
                except IndexError:
                    continue
                raise AssertionError(f"{name} took an index out of range")
        if dtype == 0:
            pursue(kernels, (B, m, n, d, k), h, rows, values, threads)
        cases += 1
    print(cases, "cases")


if __name__ == "__main__":
    main(sys.argv[1])
