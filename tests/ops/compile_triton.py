"""Compiles every kernel, as each operation would launch it, for an H100/H200 (sm_90). Needs no GPU; launches nothing.

``python tests/ops/compile_triton.py`` prints a line a kernel. Uses Triton's compiler directly (seen working with 3.9).
"""

from __future__ import annotations

import time
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from expander_sae.ops.triton import active, scores, topk

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}


def compile_launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands in for ``JITFunction.run``: specialises as the launcher does, compiles, and stops there."""
    warps = kwargs.pop("num_warps", 4)
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        is_tensor = isinstance(value, Tensor)
        small = "i32" if not is_tensor and -(2**31) <= value < 2**31 else "i64"
        signature[parameter.name] = "*" + TYPES[value.dtype] if is_tensor else small
        if is_tensor or value % 16 == 0:
            hints[(position,)] = [["tt.divisibility", 16]]
    start = time.perf_counter()
    source = ASTSource(kernel, signature, constants, hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    seconds = time.perf_counter() - start
    print(
        f"  {kernel.__name__:22} {warps:2} warps {seconds:5.1f} s, {compiled.metadata.shared} B of shared memory",
        flush=True,
    )


def compile_configs(tuner: Autotuner, *args: Any, grid: Any, **kwargs: Any) -> None:
    """Stands in for ``Autotuner.run``: compiles every configuration instead of timing them."""
    for config in tuner.configs:
        tuner.fn.run(*args, grid=grid, **kwargs, **config.kwargs, num_warps=config.num_warps)


def compile_all(m: int, n: int, d: int, k: int, dtype: torch.dtype, *, magnitude: bool = False) -> None:
    print(f"m={m} n={n} d={d} k={k} {dtype}", flush=True)
    batch = 8
    h, code = torch.zeros(batch, m, dtype=dtype), torch.zeros(batch, k, dtype=dtype)
    rows, indices = torch.zeros(n, d, dtype=torch.int32), torch.zeros(batch, k, dtype=torch.int32)
    values, bias = torch.zeros(n, d, dtype=dtype), torch.zeros(n, dtype=dtype)
    topk.encode_topk(h, rows, values, bias, k, magnitude)
    scores.correlate(h, rows, values)
    active.decode(indices, code, rows, values, m)
    active.correlate_at(h, indices, rows, values)
    active.values_grad(h, indices, code, rows)
    active.gram(indices, rows, values)


if __name__ == "__main__":
    torch.set_num_threads(1)
    JITFunction.run = compile_launch
    Autotuner.run = compile_configs
    compile_all(2048, 16384, 7, 64, torch.bfloat16)
    compile_all(512, 4096, 30, 32, torch.float32, magnitude=True)
    compile_all(70_000, 512, 13, 1, torch.float16)
