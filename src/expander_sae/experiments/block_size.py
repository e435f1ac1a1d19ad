"""``reproduce block-size``: OMP with ``L`` columns a round, time against error, in the shape of the paper's Table 5."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expander_sae.dictionary import ExpanderDictionary, ExpanderMatrix
from expander_sae.experiments.common.results import Finding
from expander_sae.experiments.common.resume import Cells
from expander_sae.experiments.registry import Experiment, register
from expander_sae.mask import Mask
from expander_sae.ops import SparseCode
from expander_sae.progress import progress
from expander_sae.pursuit import omp
from expander_sae.report import picture
from expander_sae.report.table import Column, number, spread, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    Column("where", text("where")),
    Column("data", text("data"), words=True),
    Column("rule, L", lambda row: f"{row['rule']}, {row['block']}", words=True),
    Column("µs per sample", number("microseconds", ",.2f")),
    Column("speed-up over L=1", number("over_iterative", ".2f")),
    Column("over one-shot", number("over_one_shot", ".3f")),
    Column("rel. error", spread("relative_error", ".4f")),
)
DATA = ("planted", "gaussian")
RULES = ("plain", "disjoint")


@dataclass(frozen=True)
class BlockSize:
    """The problem of ``reproduce block-size`` and how it is timed."""

    m: int = 512
    """Width."""
    n: int = 4096
    """Features."""
    d: int = 7
    """Degree."""
    k: int = 64
    """Features per sample."""
    batch: int = 1024
    """Samples."""
    blocks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """The ``L`` compared; the last is one-shot if it is ``k``."""
    noise: float = 0.3
    """Norm of the planted data's noise, as a fraction of the signal's."""
    repeats: int = 5
    """Timed calls, of which the median counts."""
    devices: tuple[str, ...] = ()
    """Where to run, `cpu` or `cuda`; none named: the CPU, and CUDA if there is one."""
    seed: int = 0
    """Of mask, values and data."""


LAPTOP = BlockSize()
SMOKE = BlockSize(m=64, n=256, d=5, k=8, batch=32, blocks=(1, 8), repeats=1)


def run_block_size(settings: BlockSize, out: Path) -> Finding:
    """Time every block size under both rules.

    The CPU runs in float32, a GPU in bfloat16 (activations and values; the solver accumulates in float32).
    """
    devices = settings.devices or (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
    same = {name: value for name, value in asdict(settings).items() if name != "devices"}
    cells = Cells(out, same | {"torch_threads": torch.get_num_threads()})
    rows: list[dict[str, Any]] = []
    # One column a round is disjoint of itself: that row would only repeat the plain rule's.
    pairs = [(rule, block) for rule in RULES for block in settings.blocks if rule == "plain" or block > 1]
    with progress("Block sizes", len(devices) * len(DATA) * len(pairs), "cell") as advance:
        for device in devices:
            dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
            matrix, data = problem(settings)
            matrix = ExpanderMatrix(matrix.rows.to(device), matrix.values.to(device, dtype), matrix.d_in)
            where = f"{device} {str(dtype).removeprefix('torch.')}"
            for kind, h in data.items():
                h = h.to(device, dtype)
                for rule, block in pairs:
                    measured = cells.get(
                        f"{where}: {kind}, {rule}, {block}",
                        lambda h=h, matrix=matrix, rule=rule, block=block: measure(h, matrix, settings, rule, block),
                    )
                    facts = {"where": where, "data": kind, "rule": rule, "block": block}
                    rows.append(facts | {"rounds": -(-settings.k // block)} | measured)
                    advance(1)
    title = (
        f"OMP with L columns in each round: m={settings.m}, n={settings.n}, k={settings.k}, d={settings.d}, "
        f"{settings.batch} samples"
    )
    notes = [
        "Rule plain: the L best of a round by magnitude; disjoint: the best that share no row. L = k is one-shot "
        "selection and a refit. Codes are signed. Speed-ups are against the plain rule on the same device and data; "
        "the paper's Table 5 has that rule, by signed correlation, on an A10G in bf16.",
        f"Planted: {settings.k} features with Gaussian coefficients and noise of {settings.noise:.0%} of the signal's "
        "norm; gaussian: no structure at all. Columns with Gaussian entries, unit norm. Median of "
        f"{settings.repeats} calls, {torch.get_num_threads()} threads. ± is the deviation over samples.",
    ]
    return Finding(with_speed_ups(rows), title, notes)


def problem(settings: BlockSize) -> tuple[ExpanderMatrix, dict[str, Tensor]]:
    """The matrix and the samples ``(batch, m)`` by name, float32 on the CPU."""
    generator = torch.Generator().manual_seed(settings.seed)
    mask = Mask.build("left-regular", d_in=settings.m, d_sae=settings.n, degree=settings.d, seed=settings.seed)
    matrix = ExpanderDictionary(mask, generator=generator).core().detach()
    features = (
        torch.rand(settings.batch, settings.n, generator=generator).topk(settings.k, dim=1).indices.to(torch.int32)
    )
    clean = matrix.decode(SparseCode(features, torch.randn(settings.batch, settings.k, generator=generator)))
    noise = torch.randn(settings.batch, settings.m, generator=generator)
    scale = settings.noise * clean.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    return matrix, {
        "planted": clean + scale * noise,
        "gaussian": torch.randn(settings.batch, settings.m, generator=generator),
    }


def measure(h: Tensor, matrix: ExpanderMatrix, settings: BlockSize, rule: str, block: int) -> dict[str, Any]:
    """Median time of a call and the relative error it reaches."""

    def call():
        return omp(h, matrix, settings.k, block=block, disjoint=rule == "disjoint")

    code = call()  # warm: kernels are compiled, buffers made
    seconds = statistics.median(_timed(call, h.device) for _ in range(settings.repeats))
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


def plot_block_size(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Relative error and time per sample against ``L``, a row of panels for each data set, a line for each rule.

    ``rows`` have ``where``, ``data``, ``rule``, ``block``, ``microseconds`` and ``relative_error``.
    """
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    lines = list(dict.fromkeys((row["where"], row["rule"]) for row in rows))
    figure, grid = picture.panels(2, len(kinds), height=3.6)
    for panels, kind in zip(grid, kinds, strict=True):
        for axes, key, label in zip(
            panels, ("relative_error", "microseconds"), ("relative error", picture.PER_SAMPLE), strict=True
        ):
            for place, (where, rule) in enumerate(lines):
                line = [row for row in rows if (row["data"], row["where"], row["rule"]) == (kind, where, rule)]
                look = picture.style(place).line()
                axes.plot([row["block"] for row in line], [row[key] for row in line], label=f"{where}, {rule}", **look)
            axes.set_xscale("log", base=2)
            axes.set_title(f"{kind} data", fontsize=10)
            axes.set_ylabel(label)
            axes.set_xlabel("columns in each round, L")
    picture.legend(figure)
    figure.suptitle(title)
    return figure


register(
    Experiment(
        name="block-size",
        question="What do L columns in each round of OMP save, and what do they cost (the paper's Table 5)?",
        sizes={"smoke": SMOKE, "laptop": LAPTOP, "paper": replace(LAPTOP, repeats=20)},
        run=run_block_size,
        columns=COLUMNS,
        picture=plot_block_size,
    )
)
