"""``reproduce amortisation``: what an SAE's own encoder leaves on the table, against OMP on the same dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expander_sae.experiments.common.arms import PURSUITS, arms
from expander_sae.experiments.common.results import Finding
from expander_sae.experiments.common.resume import Cells
from expander_sae.experiments.common.seeds import over_seeds, without_seeds
from expander_sae.experiments.common.subject import Subject, sae_hash, trained
from expander_sae.experiments.registry import Experiment, register
from expander_sae.report import picture
from expander_sae.report.table import Column, number, signs, spread, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READINGS = ("", "omp_", "signed_omp_")
FIGURES = (
    *(f"{reading}{figure}" for reading in READINGS for figure in ("relative_error", "fvu", "ce_recovered")),
    "gap", "signed_gap", "train_seconds",
)  # fmt: skip
COLUMNS = (
    Column("SAE", text("name")),
    Column("values", number("num_values", ",")),
    Column("codes", signs, words=True),
    Column("rel. error", spread("relative_error", ".3f")),
    Column("gap, OMP by magnitude", spread("gap", ".1%")),
    Column("gap, signed OMP", spread("signed_gap", ".1%")),
    Column("CE recovered", spread("ce_recovered", ".3f")),
)
DETAILS = (
    Column("SAE", text("name")),
    Column("d_sae, k", lambda row: f"{row['d_sae']:,}, {row['k']}"),
    Column("FVU", spread("fvu", ".3f")),
    Column("FVU, OMP (magnitude)", spread("omp_fvu", ".3f")),
    Column("FVU, OMP (signed)", spread("signed_omp_fvu", ".3f")),
    Column("CE recovered, OMP (magnitude)", spread("omp_ce_recovered", ".3f")),
    Column("train s", number("train_seconds", ",.0f")),
)


@dataclass(frozen=True)
class AmortisationSettings:
    """How much ``reproduce amortisation`` does."""

    model: str = "embedded"
    """Language model studied."""
    tokens: int = 400_000
    """Activation vectors to train on."""
    windows: int = 32
    """Held-out windows the SAEs are evaluated on, in the model."""
    preset: str = "modern"
    """Preset of the TopK encoders; the others are trained with `pursuit`."""
    steps: int = 1000
    """Steps of every training."""
    batch_size: int = 1024
    """Activation vectors in each step."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of everything."""
    dense_pursuit: bool = False
    """Train the full-width dense SAE by pursuit, too; it costs more than all the rest."""
    d_sae: int = 4608
    """Features of the expanders and of the wide dense SAE."""
    k: int = 32
    """Features per sample."""
    degrees: tuple[int, ...] = (7, 30)
    """An expander for each, and a dense SAE that learns as many values."""


LAPTOP = AmortisationSettings()
SMOKE = AmortisationSettings(
    tokens=4096, windows=1, steps=8, batch_size=64, seeds=(0,), d_sae=64, k=4, degrees=(3,)
)  # fmt: skip
PAPER = replace(
    LAPTOP, model="pythia-70m", tokens=1_280_000, windows=64, preset="paper", steps=5000, batch_size=256,
    dense_pursuit=True, d_sae=4096, k=64, degrees=(7, 30, 50, 100, 200),
)  # fmt: skip


def chosen_arms(d_in: int, settings: AmortisationSettings) -> dict[str, dict[str, Any]]:
    """Expander, dense and matched-width dense SAEs, each with a TopK encoder and with a pursuit, signed and not."""
    chosen = arms(d_in, settings.d_sae, settings.k, settings.degrees, preset=settings.preset)
    wide = [f"dense-n{settings.d_sae}-{way}" for way in PURSUITS]
    return {name: arm for name, arm in chosen.items() if settings.dense_pursuit or name not in wide}


def run_amortisation(settings: AmortisationSettings, out: Path) -> Finding:
    """Train and evaluate in the model under the own encoder and under both OMPs; one row for each SAE, over seeds."""
    subject = Subject.of(settings.model)
    store = subject.activations(settings.tokens)
    cells = Cells(out, without_seeds(settings))
    chosen = chosen_arms(store.d_in, settings)
    rows = []
    for seed in settings.seeds:
        for name, arm in chosen.items():
            training = {"steps": settings.steps, "batch_size": settings.batch_size, "seed": seed}
            key, arm = f"{name}-seed{seed}", arm | training

            def one(name: str = name, key: str = key, arm: Mapping[str, Any] = arm) -> dict[str, Any]:
                sae = trained(key, arm, store, out)
                both = {name: sae, "signed OMP": sae.with_encoder("omp", signed=True)}
                own, signed = subject.evaluate(both, settings.windows)
                figures = ("relative_error", "fvu", "ce_recovered")
                return own | {f"signed_omp_{figure}": signed[figure] for figure in figures}

            row = cells.get(key, one, lambda key=key: sae_hash(out / key))
            gaps = {
                "gap": 1 - row["omp_relative_error"] / row["relative_error"],
                "signed_gap": 1 - row["signed_omp_relative_error"] / row["relative_error"],
            }
            rows.append(row | {"seed": seed} | gaps)
    table = over_seeds(rows, ("name",), FIGURES)
    notes = [
        f"{settings.steps:,} steps of {settings.batch_size:,} each; {rows[0]['tokens']:,} held-out positions. Gap: by "
        "how much OMP lowers the relative error of the own encoder, selecting by the largest magnitude of the "
        "correlation, or by the largest signed one, as the paper does: its 15 to 25 % are to be compared with that. "
        f"± is the deviation over {len(settings.seeds)} seeds.",
        "A name with -pursuit was trained and is read by matching pursuit with a refit, -pursuit-nonneg likewise with "
        f"codes that are not negative, the others by TopK with preset `{settings.preset}` (the dense SAE of full width "
        "untied).",
    ]
    if not settings.dense_pursuit:
        notes.append("The full-width dense SAE trained by pursuit is left out: it takes longer than all the others.")
    return Finding(table, f"The amortisation gap, {subject}", notes, {"arms": chosen})


def plot_amortisation(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Own encoder and OMP on the same dictionary, joined: relative error and CE recovered, one line for each SAE.

    ``rows`` have ``name``, ``relative_error``, ``ce_recovered`` and the same with ``omp_`` and ``signed_omp_``.
    """
    figure, (line,) = picture.panels(2, height=1.8 + 0.42 * len(rows))
    panels = (
        ("relative_error", "relative error (lower is better)"),
        ("ce_recovered", "CE recovered (higher is better)"),
    )
    places = list(range(len(rows)))
    labels = ("own encoder", "OMP (magnitude)", "OMP (signed, the paper's)")
    for axes, (key, label) in zip(line, panels, strict=True):
        found = {reading: [row[f"{reading}{key}"] for row in rows] for reading in READINGS}
        axes.hlines(places, found[""], found["omp_"], color="0.7", lw=3, zorder=1)
        for place, (reading, name) in enumerate(zip(READINGS, labels, strict=True)):
            axes.plot(found[reading], places, label=name, **picture.style(place).points(hollow=reading != ""))
        axes.set_xlabel(label)
        axes.set_yticks(places, [row["name"] for row in rows])
        axes.invert_yaxis()
    for axes in line[1:]:
        axes.tick_params(labelleft=False)
    picture.legend(figure)
    figure.suptitle(title)
    return figure


register(
    Experiment(
        name="amortisation",
        question="How much of the error is the encoder's and not the dictionary's?",
        sizes={"smoke": SMOKE, "laptop": LAPTOP, "paper": PAPER},
        run=run_amortisation,
        columns=COLUMNS,
        picture=plot_amortisation,
        details=DETAILS,
    )
)
