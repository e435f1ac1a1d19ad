"""``reproduce amortisation``: what an SAE's own encoder leaves on the table, against OMP on the same dictionary."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from expander_sae import lm as language
from expander_sae.evaluation import evaluation_rows
from expander_sae.experiments.common.cells import Cells
from expander_sae.experiments.common.embedded import (
    LAYER,
    PRESET,
    WINDOW,
    activations,
    over_seeds,
    sizes_without_seeds,
    trained,
)
from expander_sae.experiments.common.record import conclude
from expander_sae.experiments.demo import arms
from expander_sae.report.pursuit import plot_amortisation
from expander_sae.report.table import Column, number, spread

FIGURES = (
    "relative_error", "fvu", "ce_recovered", "omp_relative_error", "omp_fvu", "omp_ce_recovered", "gap",
    "train_seconds",
)  # fmt: skip
COLUMNS = (
    Column("SAE", lambda row: str(row["name"])),
    Column("encoder", lambda row: str(row["encoder"])),
    Column("values", number("num_values", ",")),
    Column("rel. error", spread("relative_error", ".3f")),
    Column("with OMP", spread("omp_relative_error", ".3f")),
    Column("gap", spread("gap", ".1%")),
    Column("FVU", spread("fvu", ".3f")),
    Column("with OMP", spread("omp_fvu", ".3f")),
    Column("CE rec.", spread("ce_recovered", ".3f")),
    Column("with OMP", spread("omp_ce_recovered", ".3f")),
    Column("train s", number("train_seconds", ",.0f")),
)


@dataclass(frozen=True)
class AmortisationSize:
    """How much ``reproduce amortisation`` does.

    Attributes:
        tokens: activation vectors to train on.
        windows: held-out windows the SAEs are evaluated on, in the model.
        steps, batch_size: of every training.
        seeds: runs of everything.
        dense_pursuit: train the full-width dense SAE by pursuit, too; it costs more than all the rest.
        d_sae, k, degrees: sizes.
    """

    tokens: int = 400_000
    windows: int = 32
    steps: int = 1000
    batch_size: int = 1024
    seeds: tuple[int, ...] = (0, 1, 2)
    dense_pursuit: bool = True
    d_sae: int = PRESET.d_sae
    k: int = PRESET.k
    degrees: tuple[int, ...] = PRESET.degrees


FULL = AmortisationSize()
QUICK = replace(FULL, windows=4, steps=100, batch_size=512, seeds=(0,), dense_pursuit=False)


def amortisation_arms(d_in: int, size: AmortisationSize) -> dict[str, dict[str, Any]]:
    """Expander, dense and matched-width dense SAEs, each trained with preset ``modern`` and with ``pursuit``."""
    chosen: dict[str, dict[str, Any]] = {}
    for name, settings in arms(d_in, size.d_sae, size.k, size.degrees).items():
        if "preset" in settings:
            continue  # made below, for every dictionary
        chosen[name] = settings
        if name != f"dense-n{size.d_sae}" or size.dense_pursuit:
            shape = {key: settings[key] for key in ("dictionary", "d_sae", "degree", "k") if key in settings}
            chosen[f"{name}-pursuit"] = {"preset": "pursuit", **shape}
    return chosen


def run_amortisation(out: str | Path = "runs/amortisation", size: AmortisationSize = FULL) -> list[dict[str, Any]]:
    """Train, evaluate in the model under the own encoder and under OMP, print and write the table and a picture.

    Interrupted and started again, it skips what is finished. Writes ``results.json``, ``results.md`` and
    ``amortisation.png`` into ``out``, and a folder for every SAE. Returns the rows, one an SAE, over seeds.
    """
    out = Path(out)
    store = activations(size.tokens)
    cells = Cells(out, sizes_without_seeds(size))
    settings = amortisation_arms(store.d_in, size)
    runs = [(f"{name}-seed{seed}", name, seed) for seed in size.seeds for name in settings]
    missing = [run for run in runs if run[0] not in cells]
    print(f"{len(runs)} SAEs of {size.steps:,} steps, {len(missing)} to do; results in {out}", file=sys.stderr)
    lm = language.load_model(language.EMBEDDED) if missing else None
    windows = (
        list(language.sample_windows(lm.tokenizer, language.EMBEDDED, "heldout", WINDOW, size.windows)) if lm else []
    )
    rows = []
    for key, name, seed in runs:

        def one(key: str = key, name: str = name, seed: int = seed) -> dict[str, Any]:
            assert lm is not None
            training = {"steps": size.steps, "batch_size": size.batch_size, "seed": seed}
            sae = trained(key, settings[name] | training, store, out)
            return evaluation_rows({name: sae}, lm, windows, LAYER)[0]

        row = cells.get(key, one)
        rows.append(row | {"seed": seed, "gap": 1 - row["omp_relative_error"] / row["relative_error"]})
    table = over_seeds(rows, ("name",), FIGURES)
    title = f"The amortisation gap, {PRESET.hub_id} layer {LAYER}"
    notes = [
        f"{size.steps:,} steps of {size.batch_size:,} each; {rows[0]['tokens']:,} held-out positions. Gap: by how much "
        f"OMP lowers the relative error of the own encoder. ± is the deviation over {len(size.seeds)} seeds.",
        "A name with -pursuit was trained with that preset (codes by matching pursuit with a refit), the others with "
        "`modern` (TopK; the dense SAE of full width untied).",
    ]
    if not size.dense_pursuit:
        notes.append(
            "The full-width dense SAE trained by pursuit is left out: it takes longer than all others together."
        )
    facts = {"size": asdict(size), "arms": settings}
    conclude(out, table, COLUMNS, facts, title, notes, "amortisation.png", plot_amortisation)
    return table
