"""``reproduce block-size``: OMP with ``L`` columns a round, time against error, in the shape of the paper's Table 5."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expander_sae.dictionary import ExpanderDictionary, ExpanderMatrix
from expander_sae.experiments.common.cells import Cells
from expander_sae.experiments.common.record import conclude
from expander_sae.mask import Mask
from expander_sae.ops import SparseCode
from expander_sae.progress import progress
from expander_sae.pursuit import omp
from expander_sae.report.pursuit import plot_block_size
from expander_sae.report.table import Column, number, spread

COLUMNS = (
    Column("where", lambda row: str(row["where"])),
    Column("data", lambda row: str(row["data"])),
    Column("rule", lambda row: str(row["rule"])),
    Column("L", number("block", "d")),
    Column("rounds", number("rounds", "d")),
    Column("ms a batch", number("milliseconds", ",.2f")),
    Column("µs a sample", number("microseconds", ",.2f")),
    Column("speed-up over L=1", number("over_iterative", ".2f")),
    Column("over one-shot", number("over_one_shot", ".3f")),
    Column("rel. error", spread("relative_error", ".4f")),
)
DATA = ("planted", "gaussian")
RULES = ("plain", "disjoint")


@dataclass(frozen=True)
class BlockSize:
    """The table's problem and how it is timed.

    Attributes:
        m, n, d, k, batch: width, features, degree, features a sample, samples.
        blocks: the ``L`` compared; the last is one-shot if it is ``k``.
        noise: of the planted data, as a fraction of the signal's norm.
        repeats: timed calls, of which the median counts.
        seed: of mask, values and data.
    """

    m: int = 512
    n: int = 4096
    d: int = 7
    k: int = 64
    batch: int = 1024
    blocks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    noise: float = 0.3
    repeats: int = 5
    seed: int = 0


FULL = BlockSize()
QUICK = replace(FULL, batch=128, blocks=(1, 8, 64), repeats=1)


def run_block_size(
    out: str | Path = "runs/block-size", size: BlockSize = FULL, devices: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Time every block size under both rules; print and write the table and a picture.

    The CPU runs in float32, a GPU in bfloat16 (activations and values; the solver accumulates in float32). Interrupted
    and started again, it skips what is finished. Writes ``results.json``, ``results.md`` and ``block-size.png`` into
    ``out``.

    Args:
        out: the folder.
        size: the problem.
        devices: where to run; by default the CPU, and CUDA if there is one.
    """
    out = Path(out)
    devices = devices or (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
    cells = Cells(out, {"size": asdict(size), "torch_threads": torch.get_num_threads()})
    print(
        f"m={size.m} n={size.n} d={size.d} k={size.k}, {size.batch} samples, on {', '.join(devices)}", file=sys.stderr
    )
    rows: list[dict[str, Any]] = []
    # One column a round is disjoint of itself: that row would only repeat the plain rule's.
    pairs = [(rule, block) for rule in RULES for block in size.blocks if rule == "plain" or block > 1]
    with progress("Block sizes", len(devices) * len(DATA) * len(pairs), "cell") as advance:
        for device in devices:
            dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
            matrix, data = problem(size)
            matrix = ExpanderMatrix(matrix.rows.to(device), matrix.values.to(device, dtype), matrix.d_in)
            where = f"{device} {str(dtype).removeprefix('torch.')}"
            for kind, h in data.items():
                h = h.to(device, dtype)
                for rule, block in pairs:
                    measured = cells.get(
                        f"{where}: {kind}, {rule}, {block}",
                        lambda h=h, matrix=matrix, rule=rule, block=block: measure(h, matrix, size, rule, block),
                    )
                    facts = {"where": where, "data": kind, "rule": rule, "block": block}
                    rows.append(facts | {"rounds": -(-size.k // block)} | measured)
                    advance(1)
    table = with_speed_ups(rows)
    title = f"OMP with L columns a round: m={size.m}, n={size.n}, k={size.k}, d={size.d}, {size.batch} samples"
    notes = [
        "Rule plain: the L best of a round; disjoint: the best that share no row. L = k is one-shot selection and a "
        "refit. Speed-ups are against the plain rule on the same device and data; the paper's Table 5 has that rule on "
        "an A10G in bf16.",
        f"Planted: {size.k} features with Gaussian coefficients and noise of {size.noise:.0%} of the signal's norm; "
        f"gaussian: no structure at all. Columns with Gaussian entries, unit norm. Median of {size.repeats} calls, "
        f"{torch.get_num_threads()} threads. ± is the deviation over samples.",
    ]
    conclude(out, table, COLUMNS, {"size": asdict(size)}, title, notes, "block-size.png", plot_block_size)
    return table


def problem(size: BlockSize) -> tuple[ExpanderMatrix, dict[str, Tensor]]:
    """The matrix and the samples ``(batch, m)`` by name, float32 on the CPU."""
    generator = torch.Generator().manual_seed(size.seed)
    mask = Mask.build("left-regular", d_in=size.m, d_sae=size.n, degree=size.d, seed=size.seed)
    matrix = ExpanderDictionary(mask, generator=generator).matrix().detach()
    features = torch.rand(size.batch, size.n, generator=generator).topk(size.k, dim=1).indices.to(torch.int32)
    clean = matrix.decode(SparseCode(features, torch.randn(size.batch, size.k, generator=generator)))
    noise = torch.randn(size.batch, size.m, generator=generator)
    scale = size.noise * clean.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    return matrix, {"planted": clean + scale * noise, "gaussian": torch.randn(size.batch, size.m, generator=generator)}


def measure(h: Tensor, matrix: ExpanderMatrix, size: BlockSize, rule: str, block: int) -> dict[str, Any]:
    """Median time of a call and the relative error it reaches."""

    def call():
        return omp(h, matrix, size.k, block=block, disjoint=rule == "disjoint")

    code = call()  # warm: kernels are compiled, buffers made
    seconds = statistics.median(_timed(call, h.device) for _ in range(size.repeats))
    errors = code.residual_norms.double() / h.double().norm(dim=1)
    return {
        "milliseconds": seconds * 1e3,
        "microseconds": seconds / h.shape[0] * 1e6,
        "relative_error": float(errors.mean()),
        "relative_error_sd": float(errors.std()) if h.shape[0] > 1 else None,
    }


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def with_speed_ups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their speed against the smallest and the largest block of the plain rule, same device and data."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["where"], row["data"]), []).append(row)
    for members in groups.values():
        plain = [row for row in members if row["rule"] == "plain"]
        first, last = (pick(plain, key=lambda row: row["block"])["milliseconds"] for pick in (min, max))
        for row in members:
            row["over_iterative"], row["over_one_shot"] = first / row["milliseconds"], last / row["milliseconds"]
    return rows
