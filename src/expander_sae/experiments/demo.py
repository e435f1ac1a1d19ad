"""The main job on the embedded default: harvest, train Expander SAEs and controls, evaluate, show the frontier."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from expander_sae import lm as language
from expander_sae.evaluation import evaluation_rows
from expander_sae.experiments.common.embedded import LAYER, PRESET, WINDOW, activations, train_arm
from expander_sae.experiments.common.record import conclude
from expander_sae.report.frontier import plot_frontier
from expander_sae.report.table import EVALUATION_COLUMNS
from expander_sae.training.recipe import resolve

METRICS = ("relative_error", "fvu", "l0", "ce_clean", "ce_zero", "ce_recon", "ce_recovered", "replaced", "tokens")


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does.

    Attributes:
        tokens: activation vectors harvested.
        steps: optimiser steps of every arm.
        batch_size: activation vectors a step.
        held_out_windows: windows of other articles, ``WINDOW`` tokens each, for the evaluation.
    """

    tokens: int
    steps: int
    batch_size: int
    held_out_windows: int


FULL = DemoSize(tokens=300_000, steps=750, batch_size=1024, held_out_windows=24)
QUICK = replace(FULL, steps=150, batch_size=512, held_out_windows=6)


def arms(d_in: int, d_sae: int, k: int, degrees: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """The SAEs compared, as settings.

    An expander a degree with a TopK encoder, the same trained and read by pursuit, the dense TopK SAE, and a
    matched-width dense SAE a degree: ``n' = d·n/m`` tied features, so that it learns as many values as its expander.
    """
    settings: dict[str, dict[str, Any]] = {}
    for degree in degrees:
        expander = {"dictionary": "expander", "d_sae": d_sae, "degree": degree, "k": k}
        settings[f"expander-d{degree}"] = expander
        settings[f"expander-d{degree}-pursuit"] = {"preset": "pursuit", **expander}
    # An untied encoder's small entries want smaller steps: the best of 2e-3, 4e-3, 8e-3 at this length.
    settings[f"dense-n{d_sae}"] = {"dictionary": "dense", "encoder": "untied", "d_sae": d_sae, "k": k, "lr": 4e-3}
    for degree in degrees:
        width = degree * d_sae // d_in
        settings[f"dense-n{width}"] = {"dictionary": "dense", "d_sae": width, "k": min(k, width)}
    return settings


def run_demo(out: str | Path = "runs/demo", *, quick: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Run the demo; interrupted and started again, it continues. Returns the rows of the table it prints.

    Writes ``results.json``, ``results.md``, ``frontier.png`` and a folder for every SAE into ``out``.
    """
    began = time.perf_counter()
    out, size = Path(out), QUICK if quick else FULL
    print(
        f"Demo: {size.tokens:,} tokens of layer {LAYER}, {size.steps:,} steps of {size.batch_size:,}, "
        f"{size.held_out_windows} held-out windows of {WINDOW} tokens; results in {out}",
        file=sys.stderr,
    )
    lm = language.load_model(language.EMBEDDED)
    store = activations(size.tokens)
    shared = {"steps": size.steps, "batch_size": size.batch_size, "seed": seed}
    shared["dead_after"] = size.steps * size.batch_size // 4
    recipes = {
        name: resolve(settings, shared)
        for name, settings in arms(lm.d_model, PRESET.d_sae, PRESET.k, PRESET.degrees).items()
    }
    saes = {name: train_arm(name, recipe, store, out / name) for name, recipe in recipes.items()}
    windows = language.sample_windows(lm.tokenizer, language.EMBEDDED, "heldout", WINDOW, size.held_out_windows)
    rows = evaluation_rows(saes, lm, list(windows), LAYER)
    for row in rows:
        sae = saes[row["name"]]
        sae.metadata["metrics"] = {key: row[key] for key in METRICS}
        sae.save_pretrained(out / row["name"])
    manifest = store.manifest
    notes = [
        f"{lm.name} ({lm.revision}), output of block {LAYER}; trained on {len(store):,} vectors "
        f"(left out: {manifest.left_out_by_position:,} at position 0, {manifest.left_out_by_norm:,} by norm), "
        f"{size.steps:,} steps of {size.batch_size:,} for every SAE. Dead: not fired in the last "
        f"{shared['dead_after']:,} training tokens.",
        f"Held out: {rows[0]['tokens']:,} positions of {len(windows)} windows from other articles. CE in nats with "
        f"{rows[0]['replaced'].replace('-', ' ')} positions replaced, {rows[0]['left_alone']} left alone "
        "for their norm; CE recovered = (zero - recon.) / (zero - clean). "
        "OMP: the same dictionary read by orthogonal matching pursuit.",
    ]
    title = f"Storage and fidelity, {PRESET.hub_id} layer {LAYER}" + (" (quick)" if quick else "")
    settings = {"size": asdict(size), "recipes": {name: recipe.to_dict() for name, recipe in recipes.items()}}
    folders = (f"{len(saes)} SAE folders",)
    conclude(out, rows, EVALUATION_COLUMNS, settings, title, notes, "frontier.png", plot_frontier, also=folders)
    print(f"Took {time.perf_counter() - began:.0f} s.")
    return rows
