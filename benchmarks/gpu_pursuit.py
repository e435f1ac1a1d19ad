"""The paper's Table 5 on the GPU: OMP with ``L`` columns a round, time and relative error, in bfloat16 and float32.

The experiment is ``expander-sae reproduce block-size``; here its problem runs in both types, under the plain rule, and
the answers are held against the same solver on the CPU first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_run import Run
from expander_sae.dictionary import ExpanderMatrix
from expander_sae.experiments.block_size import BlockSize, measure, problem, with_speed_ups
from expander_sae.pursuit import omp

_CHECKED = 32  # samples solved again on the CPU
_ERRORS_DIFFER = 2e-3  # a tie decided the other way changes one sample a little, a fault all of them a lot


def time_block_sizes(run: Run, size: BlockSize) -> None:
    """A row for each type, kind of data and ``L``; ``over_one_shot`` is the speed-up over ``L = k``."""
    matrix, data = problem(size)
    for dtype in (torch.bfloat16, torch.float32):
        held = ExpanderMatrix(matrix.rows.to(run.device), matrix.values.to(run.device, dtype), matrix.d_in)
        for kind, samples in data.items():
            h = samples.to(run.device, dtype)
            rows: list[dict[str, Any]] = []
            for block in size.blocks:
                name = f"m={size.m} n={size.n} d={size.d} k={size.k} B={size.batch} {str(dtype)[6:]} {kind} L={block}"
                with run.guarded("pursuit", name):
                    entry: dict[str, Any] = {"case": name, "where": str(dtype)[6:], "data": kind, "rule": "plain"}
                    entry |= {"block": block, "rounds": -(-size.k // block)}
                    if wrong := differs(h[:_CHECKED], held, size.k, block):
                        run.failures += 1
                        run.note("pursuit", entry | {"wrong": wrong})
                    else:
                        rows.append(entry | measure(h, held, size, "plain", block))
            for row in with_speed_ups(rows):
                run.note("pursuit", row)


def differs(h: Tensor, matrix: ExpanderMatrix, k: int, block: int) -> str:
    """Empty when the mean relative error is that of the reference on the CPU, from the same numbers."""
    on_cpu = ExpanderMatrix(matrix.rows.cpu(), matrix.values.cpu(), matrix.d_in)
    norms = h.cpu().double().norm(dim=1)
    found = omp(h, matrix, k, block=block).residual_norms.cpu().double() / norms
    expected = omp(h.cpu(), on_cpu, k, block=block, backend="reference").residual_norms.double() / norms
    off = float((found.mean() - expected.mean()).abs() / expected.mean().clamp_min(1e-30))
    if off <= _ERRORS_DIFFER:
        return ""
    return f"relative error {float(found.mean()):.5f}, on the CPU {float(expected.mean()):.5f}"
