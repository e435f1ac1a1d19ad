"""``reproduce presets``: every preset on the same activations, the same number of them, under its own encoder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expander_sae.experiments.common.results import Finding
from expander_sae.experiments.common.resume import Cells
from expander_sae.experiments.common.seeds import over_seeds, without_seeds
from expander_sae.experiments.common.subject import Subject, sae_hash, trained
from expander_sae.experiments.registry import Experiment, register
from expander_sae.report import picture
from expander_sae.report.table import Column, number, signs, spread, text
from expander_sae.training.divergence import TrainingDiverged
from expander_sae.training.recipe import resolve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = (
    "relative_error", "fvu", "omp_fvu", "ce_recovered", "omp_ce_recovered", "ce_recon", "dead", "silent",
    "train_seconds",
)  # fmt: skip
COLUMNS = (
    Column("preset", text("preset")),
    Column("codes", signs, words=True),
    Column("rel. error", spread("relative_error", ".3f")),
    Column("FVU", spread("fvu", ".3f")),
    Column("CE recovered", spread("ce_recovered", ".3f")),
    Column("dead", spread("dead", ",.0f")),
    Column("train s", number("train_seconds", ",.1f")),
)
DETAILS = (
    Column("preset", text("preset")),
    Column("steps × batch", lambda row: f"{row['steps']:,} × {row['batch_size']:,}"),
    Column("FVU, OMP", spread("omp_fvu", ".3f")),
    Column("CE recovered, OMP", spread("omp_ce_recovered", ".3f")),
    Column("CE recon.", spread("ce_recon", ".3f")),
    Column("silent", spread("silent", ",.0f")),
    Column("runs, diverged", lambda row: f"{row['runs']}, {row['diverged']}"),
)


@dataclass(frozen=True)
class PresetSettings:
    """How much ``reproduce presets`` does."""

    model: str = "embedded"
    """Language model studied."""
    tokens: int = 300_000
    """Activation vectors to train on."""
    presets: tuple[str, ...] = ("paper", "paper-stable", "modern", "pursuit", "pursuit-nonneg")
    """Which presets."""
    trained: int = 1_280_000
    """Activation vectors that every training sees: 5,000 steps of preset `paper`."""
    windows: int = 32
    """Held-out windows the SAEs are evaluated on, in the model."""
    degree: int = 7
    """Values of each feature."""
    d_sae: int = 4608
    """Features."""
    k: int = 32
    """Features per sample."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of everything."""


LAPTOP = PresetSettings()
SMOKE = PresetSettings(tokens=4096, trained=8192, windows=1, degree=3, d_sae=64, k=4, seeds=(0,))
PAPER = replace(LAPTOP, model="pythia-70m", tokens=1_280_000, windows=64, d_sae=4096, k=64)


def run_presets(settings: PresetSettings, out: Path) -> Finding:
    """Train an expander SAE with each preset and evaluate it in the model; one row for each preset, over seeds.

    A training that diverges is counted; the figures are those of the others.
    """
    subject = Subject.of(settings.model)
    store = subject.activations(settings.tokens)
    cells = Cells(out, without_seeds(settings) | {"presets": None})  # presets may be added to a finished folder
    rows = []
    for seed in settings.seeds:
        for preset in settings.presets:
            key = f"{preset}-seed{seed}"
            sizes = {"d_sae": settings.d_sae, "degree": settings.degree, "k": settings.k, "seed": seed}
            batch_size = min(resolve({"preset": preset}).train.batch_size, len(store))
            steps = {"batch_size": batch_size, "steps": max(1, settings.trained // batch_size)}
            arm = {"preset": preset} | sizes | steps

            def one(key: str = key, arm: Mapping[str, Any] = arm) -> dict[str, Any]:
                try:
                    sae = trained(key, arm, store, out)
                except TrainingDiverged as error:
                    print(f"{key}: {error}", file=sys.stderr)
                    return {"diverged": True, "signed": resolve(arm).sae.build(store.d_in).signed}
                (row,) = subject.evaluate({key: sae}, settings.windows)
                return row | {"diverged": False}

            row = cells.get(key, one, lambda key=key: sae_hash(out / key))
            rows.append(row | {"preset": preset, "seed": seed} | steps)
    table = over_seeds(rows, ("preset",), FIGURES)
    for one_preset in table:
        one_preset["diverged"] = sum(row["diverged"] for row in rows if row["preset"] == one_preset["preset"])
    failed = ", ".join(f"{row['diverged']} of {row['runs']} of {row['preset']}" for row in table if row["diverged"])
    measured = [row for row in rows if not row["diverged"]]
    if not measured:
        raise ValueError(f"every training diverged; a lower lr may help. Their logs are in {out}.")
    first = measured[0]
    notes = [
        f"Expander, n={settings.d_sae}, d={settings.degree}, k={settings.k}; every training draws {settings.trained:,} "
        f"vectors from {len(store):,}, with the preset's own batch size. {first['tokens']:,} held-out positions; CE "
        f"recovered by the convention {first['convention']}. Dead: not fired in the last 100,000 training vectors. ± "
        f"is the deviation over {len(settings.seeds)} seeds. Trainings that diverged and were stopped, left out of the "
        f"figures: {failed or 'none'}.",
    ]
    return Finding(table, f"Presets, {subject}", notes, also=(f"{len(rows)} SAE folders",))


def plot_presets(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """FVU against seconds of training, a marker for each preset; hollow: the same dictionary read by OMP.

    ``rows`` have ``preset``, ``train_seconds``, ``fvu`` and ``omp_fvu``; one without figures is left out.
    """
    figure, ((axes,),) = picture.panels(1)
    for place, row in enumerate(rows):
        if row["fvu"] is None:
            continue
        look = picture.style(place)
        axes.plot(row["train_seconds"], row["fvu"], label=row["preset"], **look.points())
        axes.plot(row["train_seconds"], row["omp_fvu"], **look.points(hollow=True))
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("FVU on held-out text")
    picture.legend(figure)
    figure.suptitle(f"{title}; hollow: read by OMP", fontsize=11)
    return figure


register(
    Experiment(
        name="presets",
        question="Which preset reconstructs best from the same number of activations?",
        sizes={"smoke": SMOKE, "laptop": LAPTOP, "paper": PAPER},
        run=run_presets,
        columns=COLUMNS,
        picture=plot_presets,
        details=DETAILS,
    )
)
