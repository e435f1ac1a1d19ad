"""``reproduce omp``: trained dictionaries read by every solver, the error of a sample and what it costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expander_sae.experiments.common.arms import untied
from expander_sae.experiments.common.results import Finding
from expander_sae.experiments.common.resume import Cells
from expander_sae.experiments.common.seeds import over_seeds, without_seeds
from expander_sae.experiments.common.subject import Subject, sae_hash, trained
from expander_sae.experiments.registry import Experiment, register
from expander_sae.progress import progress
from expander_sae.pursuit import SOLVERS
from expander_sae.report import picture
from expander_sae.report.table import Column, number, signs, spread, text
from expander_sae.sae import SAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN = "own encoder"
OMP, SIGNED_OMP = "OMP (magnitude)", "OMP (signed, the paper's)"
METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    OWN: None,
    OMP: ("omp", {}),
    SIGNED_OMP: ("omp", {"signed": True}),
    **{name: (name, {}) for name in SOLVERS if name != "omp"},
    "OMP, best 8": ("omp", {"block": 8}),
    "OMP, disjoint 8": ("omp", {"block": 8, "disjoint": True}),
}
"""Readings compared: a name, the solver and its options; ``None`` is the encoder that was trained."""

# Decoders for exactly sparse data: seconds per sample on activations, which they cannot decode. A few samples show it.
COMBINATORIAL = ("parallel-l0", "serial-l0", "robust-l0", "smp", "ssmp", "expander-recovery", "lddsr")

COLUMNS = (
    Column("dictionary, k", lambda row: f"{row['name']}, {row['k']}"),
    Column("reading", text("method"), words=True),
    Column("codes", signs, words=True),
    Column("rel. error", spread("relative_error", ".3f")),
    Column("against own", number("against_own", "+.1%")),
    Column("µs per sample", number("microseconds", ",.0f")),
    Column("samples", number("samples", ",")),
)


@dataclass(frozen=True)
class OmpSettings:
    """How much ``reproduce omp`` does."""

    model: str = "embedded"
    """Language model whose activations are read."""
    tokens: int = 400_000
    """Activation vectors to train on."""
    held_out: int = 16_384
    """Activation vectors of other documents that the samples are drawn from."""
    preset: str = "modern"
    """Preset of every training."""
    steps: int = 1000
    """Steps of every training."""
    batch_size: int = 1024
    """Activation vectors in each step."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of everything: mask, initial values, order."""
    ks: tuple[int, ...] = (16, 32, 64)
    """Features per sample."""
    degrees: tuple[int, ...] = (7, 30)
    """An expander for each; a dense dictionary (untied) stands beside them."""
    d_sae: int = 4608
    """Features of every dictionary."""
    samples: int = 256
    """Held-out vectors a solver reads."""
    few: int = 8
    """Held-out vectors a combinatorial decoder reads."""
    seconds: float = 0.2
    """A reading is repeated up to this time, and the median call counts."""


LAPTOP = OmpSettings()
SMOKE = OmpSettings(
    tokens=4096,
    held_out=2048,
    steps=20,
    batch_size=64,
    seeds=(0,),
    ks=(4,),
    degrees=(3,),
    d_sae=64,
    samples=8,
    few=1,
    seconds=0.0,
)
PAPER = replace(
    LAPTOP, model="pythia-70m", tokens=1_280_000, preset="paper", steps=5000, batch_size=256, ks=(16, 32, 64, 128),
    degrees=(7, 30, 50, 100, 200), d_sae=4096, samples=1024,
)  # fmt: skip


def run_omp(settings: OmpSettings, out: Path) -> Finding:
    """Train the SAEs and read held-out activations with every solver; one row for each reading, over seeds."""
    subject = Subject.of(settings.model)
    store, test = subject.activations(settings.tokens), subject.activations(settings.held_out, "heldout")
    h = test.sample(min(settings.samples, len(test)), 0).float()
    cells = Cells(out, without_seeds(settings) | {"torch_threads": torch.get_num_threads()})
    rows = []
    for name, arm in _arms(settings).items():
        facts = {"name": _dictionary_name(arm), "k": arm["k"], "seed": arm["seed"]}
        before = sae_hash(out / name)
        done = sum(cells.holds(f"{name}: {method}", before) for method in METHODS)
        sae = trained(name, arm, store, out) if done < len(METHODS) else None
        weights = sae_hash(out / name)
        with progress(f"Read {name}", len(METHODS), "reading", done=done) as advance:
            for method in METHODS:
                key, few = f"{name}: {method}", method in COMBINATORIAL

                def one(sae: SAE | None = sae, method: str = method, few: bool = few) -> dict[str, Any]:
                    assert sae is not None
                    return read(sae, method, h[: settings.few] if few else h, settings.seconds)

                fresh = not cells.holds(key, weights)
                rows.append(facts | {"method": method} | cells.get(key, one, lambda weights=weights: weights))
                advance(int(fresh), note=method)
    table = _against_own(over_seeds(rows, ("name", "k", "method"), ("relative_error", "samples_sd", "microseconds")))
    notes = [
        "Relative error ‖h - ĥ‖ / ‖h‖ on held-out activations, mean over samples; ± is the deviation over "
        f"{len(settings.seeds)} seeds (mask, initial values, order). Against own: change of the error against the "
        "encoder it was trained with. Time per sample in one batch of all samples, "
        f"{torch.get_num_threads()} threads. A dash: the solver does not take such a dictionary.",
        "OMP selects by the largest magnitude of the correlation; the paper's by the largest signed correlation, and "
        f"its 15 to 25 % lower error is to be compared with that: here {_gaps(table)}.",
    ]
    return Finding(table, f"Readings of trained dictionaries, {subject}", notes)


def read(sae: SAE, method: str, h: Tensor, timed: float) -> dict[str, Any]:
    """Error and time of one reading of ``h (N, m)``, repeated up to ``timed`` seconds.

    ``not_applicable`` says why a solver refuses the dictionary.
    """
    choice = METHODS[method]
    try:
        reader = sae if choice is None else sae.with_encoder(choice[0], **choice[1])
        reader.encode(h[:1])  # the first call makes buffers and loads kernels
    except ValueError as refused:
        return {
            "relative_error": None,
            "signed": None,
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
        if sum(seconds) >= timed:
            break
    with torch.no_grad():
        errors = (h - reader.decode(code)).double().norm(dim=1) / h.double().norm(dim=1)
    return {
        "relative_error": float(errors.mean()),
        "signed": reader.signed,
        "samples_sd": float(errors.std()) if len(h) > 1 else None,
        "microseconds": statistics.median(seconds) / len(h) * 1e6,
        "samples": len(h),
    }


def _arms(settings: OmpSettings) -> dict[str, dict[str, Any]]:
    arms = {}
    for seed in settings.seeds:
        for k in settings.ks:
            shared = {
                "preset": settings.preset, "steps": settings.steps, "batch_size": settings.batch_size,
                "d_sae": settings.d_sae, "k": k, "seed": seed,
            }  # fmt: skip
            for degree in settings.degrees:
                arms[f"expander-d{degree}-k{k}-seed{seed}"] = {"dictionary": "expander", "degree": degree, **shared}
            arms[f"dense-k{k}-seed{seed}"] = {"dictionary": "dense", **untied(settings.preset), **shared}
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


def _gaps(rows: Sequence[Mapping[str, Any]]) -> str:
    signed = [row for row in rows if row["method"] == SIGNED_OMP and row["against_own"] is not None]
    return ", ".join(f"{-row['against_own']:.1%} ({row['name']}, k={row['k']})" for row in signed)


def plot_omp(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Relative error against time per sample: a column of panels for each dictionary, a row for each ``k``.

    ``rows`` have ``name``, ``k``, ``method``, ``relative_error``, ``microseconds`` and ``samples``. Readings of fewer
    samples than the others (decoders for exactly sparse data) are left out: they would flatten the rest.
    """
    names, ks = list(dict.fromkeys(row["name"] for row in rows)), sorted({row["k"] for row in rows})
    whole = max(row["samples"] for row in rows)
    methods = [method for method in METHODS if method not in COMBINATORIAL]
    figure, grid = picture.panels(len(names), len(ks), width=4.2, height=3.4)
    for line, k in zip(grid, ks, strict=True):
        for axes, name in zip(line, names, strict=True):
            for row in rows:
                if (row["name"], row["k"], row["samples"]) == (name, k, whole):
                    look = picture.style(methods.index(row["method"])).points()
                    spread = row.get("relative_error_sd") or 0.0
                    axes.errorbar(row["microseconds"], row["relative_error"], spread, label=row["method"], **look)
            axes.set_xscale("log")
            axes.set_title(f"{name}, k = {k}", fontsize=10)
        line[0].set_ylabel("relative error")
    for axes in grid[-1]:
        axes.set_xlabel(picture.PER_SAMPLE)
    picture.legend(figure)
    figure.suptitle(title)
    return figure


register(
    Experiment(
        name="omp",
        question="What does each sparse solver make of a trained dictionary, and what does it cost?",
        sizes={"smoke": SMOKE, "laptop": LAPTOP, "paper": PAPER},
        run=run_omp,
        columns=COLUMNS,
        picture=plot_omp,
    )
)
