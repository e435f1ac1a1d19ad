"""``reproduce omp``: trained dictionaries read by every solver, the error of a sample and what it costs."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expander_sae.experiments.common.cells import Cells
from expander_sae.experiments.common.embedded import PRESET, activations, over_seeds, sizes_without_seeds, trained
from expander_sae.experiments.common.record import conclude
from expander_sae.progress import progress
from expander_sae.pursuit import SOLVERS
from expander_sae.report.pursuit import plot_solvers
from expander_sae.report.table import Column, number, spread
from expander_sae.sae import SAE

OWN = "own encoder"
METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    OWN: None,
    **{name: (name, {}) for name in SOLVERS},
    "omp, best 8": ("omp", {"block": 8}),
    "omp, disjoint 8": ("omp", {"block": 8, "disjoint": True}),
}
"""Readings compared: a name, the solver and its options; ``None`` is the encoder that was trained."""

# Decoders for exactly sparse data: seconds a sample on activations, which they cannot decode. A few samples show it.
COMBINATORIAL = ("parallel-l0", "serial-l0", "robust-l0", "smp", "ssmp", "expander-recovery", "lddsr")

SECONDS_TIMED = 0.2  # a reading is repeated up to this, and the median call counts

COLUMNS = (
    Column("dictionary", lambda row: str(row["name"])),
    Column("k", number("k", "d")),
    Column("reading", lambda row: str(row["method"])),
    Column("rel. error", spread("relative_error", ".3f")),
    Column("against own", number("against_own", "+.1%")),
    Column("sd of samples", number("samples_sd", ".3f")),
    Column("µs a sample", number("microseconds", ",.0f")),
    Column("samples", number("samples", ",")),
)


@dataclass(frozen=True)
class PursuitsSize:
    """How much ``reproduce omp`` does.

    Attributes:
        tokens: activation vectors to train on; ``held_out`` to measure on.
        steps, batch_size: of every training, preset ``modern``.
        seeds, ks, degrees, d_sae: the SAEs: an expander a degree and a dense one (untied), for every ``k`` and seed.
        samples: held-out vectors a solver reads; ``few`` for the combinatorial decoders.
    """

    tokens: int = 400_000
    held_out: int = 16_384
    steps: int = 1000
    batch_size: int = 1024
    seeds: tuple[int, ...] = (0, 1, 2)
    ks: tuple[int, ...] = (16, 32, 64)
    degrees: tuple[int, ...] = PRESET.degrees
    d_sae: int = PRESET.d_sae
    samples: int = 256
    few: int = 8


FULL = PursuitsSize()
QUICK = replace(FULL, steps=100, batch_size=512, seeds=(0,), ks=(32,), samples=32, few=2)


def run_pursuits(out: str | Path = "runs/omp", size: PursuitsSize = FULL) -> list[dict[str, Any]]:
    """Train the SAEs, read held-out activations with every solver, print and write the table and a picture.

    Interrupted and started again, it skips what is finished. Writes ``results.json``, ``results.md`` and
    ``solvers.png`` into ``out``, and an SAE folder for every training. Returns the rows, one a reading, over seeds.
    """
    out = Path(out)
    store, test = activations(size.tokens), activations(size.held_out, "heldout")
    h = test.sample(min(size.samples, len(test)), 0).float()
    cells = Cells(out, sizes_without_seeds(size) | {"torch_threads": torch.get_num_threads()})
    print(
        f"{len(_arms(size))} SAEs, {len(METHODS)} readings each, {len(h)} held-out vectors; results in {out}",
        file=sys.stderr,
    )
    saes = {
        name: trained(name, settings | {"steps": size.steps, "batch_size": size.batch_size}, store, out)
        for name, settings in _arms(size).items()
        if any(f"{name}: {method}" not in cells for method in METHODS)
    }
    rows = []
    with progress("Read by every solver", len(_arms(size)) * len(METHODS), "reading") as advance:
        for name, settings in _arms(size).items():
            facts = {"name": _dictionary_name(settings), "k": settings["k"], "seed": settings["seed"]}
            for method in METHODS:
                few = method in COMBINATORIAL
                measured = cells.get(
                    f"{name}: {method}",
                    lambda name=name, method=method, few=few: read(saes[name], method, h[: size.few] if few else h),
                )
                rows.append(facts | {"method": method} | measured)
                advance(1, note=f"{name} {method}")
    table = _against_own(over_seeds(rows, ("name", "k", "method"), ("relative_error", "samples_sd", "microseconds")))
    title = f"Readings of trained dictionaries, {PRESET.hub_id}"
    notes = [
        "Relative error ‖h - ĥ‖ / ‖h‖ on held-out activations, mean over samples; ± is the deviation over "
        f"{len(size.seeds)} seeds (mask, initial values, order). Against own: change of the error against the encoder "
        "it was trained with.",
        f"Time a sample in one batch of all samples, {torch.get_num_threads()} threads. A dash: the solver does not "
        "take such a dictionary.",
    ]
    conclude(out, table, COLUMNS, {"size": asdict(size)}, title, notes, "solvers.png", plot_solvers)
    return table


def read(sae: SAE, method: str, h: Tensor) -> dict[str, Any]:
    """Error and time of one reading of ``h (N, m)``; ``not_applicable`` says why a solver refuses the dictionary."""
    choice = METHODS[method]
    try:
        reader = sae if choice is None else sae.with_encoder(choice[0], **choice[1])
        reader.encode(h[:1])  # the first call makes buffers and loads kernels
    except ValueError as refused:
        return {
            "relative_error": None,
            "samples_sd": None,
            "microseconds": None,
            "samples": 0,
            "not_applicable": str(refused),
        }
    seconds: list[float] = []
    while True:
        began = time.perf_counter()
        code = reader.encode(h)
        seconds.append(time.perf_counter() - began)
        if sum(seconds) >= SECONDS_TIMED:
            break
    with torch.no_grad():
        errors = (h - reader.decode(code)).double().norm(dim=1) / h.double().norm(dim=1)
    return {
        "relative_error": float(errors.mean()),
        "samples_sd": float(errors.std()) if len(h) > 1 else None,
        "microseconds": statistics.median(seconds) / len(h) * 1e6,
        "samples": len(h),
    }


def _arms(size: PursuitsSize) -> dict[str, dict[str, Any]]:
    arms = {}
    for seed in size.seeds:
        for k in size.ks:
            shared = {"d_sae": size.d_sae, "k": k, "seed": seed}
            for degree in size.degrees:
                arms[f"expander-d{degree}-k{k}-seed{seed}"] = {"dictionary": "expander", "degree": degree, **shared}
            # As in the demo: an untied encoder wants smaller steps.
            arms[f"dense-k{k}-seed{seed}"] = {"dictionary": "dense", "encoder": "untied", "lr": 4e-3, **shared}
    return arms


def _dictionary_name(settings: Mapping[str, Any]) -> str:
    return f"expander d={settings['degree']}" if settings["dictionary"] == "expander" else "dense"


def _against_own(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the change against the own encoder, where both read the same samples."""
    own = {(row["name"], row["k"]): row for row in rows if row["method"] == OWN}
    for row in rows:
        base = own[row["name"], row["k"]]
        comparable = row["method"] != OWN and row["samples"] == base["samples"]
        row["against_own"] = row["relative_error"] / base["relative_error"] - 1 if comparable else None
    return rows
