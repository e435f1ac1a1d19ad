"""How fast the Triton kernels are: encode against dense and over its own settings, and a training step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu_run import Run, Shape, close, times
from benchmarks.step import loop_step
from expander_sae import ops
from expander_sae.mask import Mask
from expander_sae.ops import Selection, reference, triton
from expander_sae.sae import SAE


def time_encode(run: Run, shapes: list[Shape], batch: int) -> None:
    """bf16: ours against matmul, bias and topk; answers compared where the dense one fits."""
    for m, n, d, k in shapes:
        name = f"m={m} n={n} d={d} k={k} B={batch} bf16"
        with run.guarded("encode", name), torch.no_grad():
            dtype = torch.bfloat16
            rows, h = run.rows(m, n, d), run.normal(batch, m, dtype=dtype)
            values, bias = run.normal(n, d, dtype=dtype, seed=1), 0.1 * run.normal(n, dtype=dtype, seed=2)
            values = values / values.norm(dim=1, keepdim=True)

            def sparse(h=h, rows=rows, values=values, bias=bias, k=k) -> ops.SparseCode:
                return ops.encode(h, rows, values, bias, Selection(k), backend="triton")

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


def sweep_encode(run: Run, shape: Shape, batch: int) -> None:
    """The knobs that were set by counting bytes: samples and scores of a tile, blocks used for the bound."""
    from expander_sae.ops.triton import topk

    m, n, d, k = shape
    rows, h = run.rows(m, n, d), run.normal(batch, m, dtype=torch.bfloat16)
    values = run.normal(n, d, dtype=torch.bfloat16, seed=1)
    shipped = topk.plan(batch, m, n, d, k, 2)
    plans = [shipped]
    for samples in (16, 32, 64):
        for features in (64, 128, 256):
            plans.append(replan(shipped, n, k, samples=samples, features=features))
    plans += [replan(shipped, n, k, stride=stride) for stride in (1, 2, 4, 8) if n // stride >= 8 * k]
    plan = topk.plan
    try:
        for cut in dict.fromkeys(plans):
            with run.guarded("encode", f"sweep {cut}"):
                topk.plan = lambda *_, cut=cut: cut
                seconds = run.time(lambda: triton.encode(h, rows, values, None, k), turns=9)
                entry = {"sweep": str(cut), "shipped": cut == shipped, "case": f"m={m} n={n} d={d} k={k} B={batch}"}
                run.note("encode", entry | times("ours", seconds, batch))
    finally:
        topk.plan = plan


def replan(cut: Any, n: int, k: int, **changes: int) -> Any:
    from expander_sae.ops.triton import topk

    cut = replace(cut, **changes)
    blocks = -(-n // cut.features)
    parts = min(-(-blocks // cut.stride), -(-4 * k // cut.features))
    return replace(cut, blocks=blocks, parts=parts, capacity=topk.capacity(k, cut.stride))


def time_step(run: Run, shapes: list[Shape], dense_shapes: list[Shape], batch: int) -> None:
    """The training loop's own step, with peak memory."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes:
            m, n, d, k = shape

            def expander(m=m, n=n, d=d, k=k) -> SAE:
                mask = Mask.build("left-regular", d_in=m, d_sae=n, degree=d, seed=1)
                return SAE.expander(mask, k, relu=True)

            step_case(run, "expander", expander, shape, dtype, batch)
        for m, n, d, k in dense_shapes:
            step_case(run, "dense", lambda m=m, n=n, k=k: SAE.dense(m, n, k=k, untied=True), (m, n, d, k), dtype, batch)


def step_case(run: Run, kind: str, build: Callable[[], SAE], shape: Shape, dtype: torch.dtype, batch: int) -> None:
    m, n, d, k = shape
    with run.guarded("step", f"{kind} {shape} {dtype}"):
        sae = build().to(run.device, dtype)
        h = run.normal(batch, m, dtype=dtype)
        step = loop_step(sae, h, lr=1e-2)  # a fall of the loss must show in bfloat16
        first = step()
        entry: dict[str, Any] = {"case": f"{kind} m={m} n={n} d={d} k={k} B={batch} {str(dtype)[6:]}"}
        entry["step_extra_bytes"] = run.peak(step)
        entry |= times("step", run.time(step, turns=10), batch)
        entry["kernels_us"] = run.kernels(step)
        if run.device.type == "cuda":
            entry["peak_bytes_all"] = torch.cuda.max_memory_allocated()
        last = step()
        entry["losses"] = [round(first, 4), round(last, 4)]
        if not last < first:
            run.failures += 1
            entry["error"] = "the loss did not fall"
        run.note("step", entry)
