"""The main job on the embedded default: harvest, train Expander SAEs and controls, evaluate, show the frontier."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expander_sae.experiments.common.arms import arms, matched_width
from expander_sae.experiments.common.results import Finding
from expander_sae.experiments.common.resume import Cells
from expander_sae.experiments.common.subject import WINDOW, Subject, sae_hash, trained
from expander_sae.experiments.registry import Experiment
from expander_sae.report.frontier import plot_frontier
from expander_sae.report.table import EVALUATION_COLUMNS, EVALUATION_DETAILS
from expander_sae.training.recipe import resolve

METRICS = ("relative_error", "fvu", "l0", "ce_clean", "ce_zero", "ce_recon", "ce_recovered", "replaced", "tokens")


@dataclass(frozen=True)
class DemoSettings:
    """How much the demo does."""

    model: str = "embedded"
    """Language model studied."""
    tokens: int = 300_000
    """Activation vectors harvested."""
    steps: int = 750
    """Steps of every training."""
    batch_size: int = 1024
    """Activation vectors in each step."""
    held_out_windows: int = 24
    """Windows of other articles for the evaluation."""
    d_sae: int = 4608
    """Features of the expanders and of the wide dense SAE."""
    k: int = 32
    """Features per sample."""
    degrees: tuple[int, ...] = (7, 30)
    """An expander for each, and a dense SAE that learns as many values."""
    seed: int = 0
    """Of masks, initial values and batch order."""


def demo_arms(d_in: int, settings: DemoSettings) -> dict[str, dict[str, Any]]:
    """The SAEs compared: for each degree an expander, the dense SAE of as many values, and the expander by pursuit.

    The cheap ones come first, so that there is something to see; the wide dense SAE takes longest and is the last.
    """
    every = arms(d_in, settings.d_sae, settings.k, settings.degrees)
    names = []
    for degree in settings.degrees:
        width = matched_width(d_in, settings.d_sae, degree)
        names += [f"expander-d{degree}", f"dense-n{width}", f"expander-d{degree}-pursuit"]
    names.append(f"dense-n{settings.d_sae}")
    shared = {
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "dead_after": settings.steps * settings.batch_size // 4,
    }
    return {name: every[name] | shared for name in names}


def run_demo(settings: DemoSettings, out: Path) -> Finding:
    """Train and evaluate one SAE after the other, showing each result at once; one row for each.

    Puts a folder for every SAE into ``out``. SAEs that are there, and their evaluation, are not computed again.
    """
    subject = Subject.of(settings.model)
    store = subject.activations(settings.tokens)
    chosen = demo_arms(store.d_in, settings)
    recipes = {name: resolve(arm).to_dict() for name, arm in chosen.items()}
    cells = Cells(out, {"size": asdict(settings), "trained_on": store.origin()})
    rows = []
    for name, arm in chosen.items():

        def one(name: str = name, arm: Mapping[str, Any] = arm) -> dict[str, Any]:
            sae = trained(name, arm, store, out)
            (row,) = subject.evaluate({name: sae}, settings.held_out_windows)
            sae.metadata["metrics"] = {key: row[key] for key in METRICS}
            sae.save_pretrained(out / name)
            return row

        row = cells.get(name, one, lambda name=name: sae_hash(out / name))
        rows.append(row)
        shown = "; ".join(f"{column.heading}: {column.show(row)}" for column in EVALUATION_COLUMNS[1:])
        print(f"  {name}: {shown}", file=sys.stderr)
    meta, manifest = store.manifest.meta, store.manifest
    notes = [
        f"{meta.model} ({meta.revision}), output of block {subject.layer}; trained on {len(store):,} vectors (left "
        f"out: {manifest.left_out_by_position:,} at position 0, {manifest.left_out_by_norm:,} by norm), "
        f"{settings.steps:,} steps of {settings.batch_size:,} for every SAE.",
        f"Held out: {rows[0]['tokens']:,} positions of {settings.held_out_windows} windows of {WINDOW} tokens from "
        f"other articles. CE recovered = (zero - recon.) / (zero - clean), in nats {rows[0]['ce_zero']:.3f} for zeros "
        f"and {rows[0]['ce_clean']:.3f} clean, with {rows[0]['replaced'].replace('-', ' ')} positions replaced, "
        f"{rows[0]['left_alone']} left alone for their norm.",
        "In brackets: the same dictionary read by orthogonal matching pursuit (by magnitude; signed codes). Dead: not "
        f"fired in the last {settings.steps * settings.batch_size // 4:,} training tokens.",
    ]
    facts = {"recipes": recipes}
    return Finding(rows, f"Storage and fidelity, {subject}", notes, facts, (f"{len(rows)} SAE folders",))


DEMO = Experiment(
    name="demo",
    question="What do Expander SAEs keep of a language model, for how many stored values?",
    sizes={
        "smoke": DemoSettings(tokens=8192, steps=50, batch_size=256, held_out_windows=2),
        "laptop": DemoSettings(),
    },
    run=run_demo,
    columns=EVALUATION_COLUMNS,
    picture=plot_frontier,
    details=EVALUATION_DETAILS,
)
"""Run by ``expander-sae demo``; not among those that ``reproduce`` offers."""
