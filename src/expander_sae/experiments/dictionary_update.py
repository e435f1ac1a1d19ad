"""``reproduce dictionary-update``: Adam against exact least-squares updates of the dictionary, error over seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expander_sae.data.sources import ActivationSource, TensorSource
from expander_sae.evaluation import reconstruction
from expander_sae.experiments.common.results import Finding
from expander_sae.experiments.common.resume import Cells
from expander_sae.experiments.common.seeds import without_seeds
from expander_sae.experiments.common.subject import Subject
from expander_sae.experiments.registry import Experiment, register
from expander_sae.progress import progress
from expander_sae.report import picture
from expander_sae.report.table import Column, number, text
from expander_sae.sae import SAE
from expander_sae.training import build_sae, train
from expander_sae.training.exact import alternate, refit_dictionary
from expander_sae.training.recipe import resolve
from expander_sae.training.start import mean_and_variance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    Column("degree, seed", lambda row: f"{row['degree']}, {row['seed']}"),
    Column("update", text("method"), words=True),
    Column("steps or rounds", number("amount", ",")),
    Column("vectors coded", number("coded", ",")),
    Column("seconds", number("seconds", ",.1f")),
    Column("FVU (OMP)", lambda row: f"{row['fvu']:.4f} ({row['omp_fvu']:.4f})"),
    Column("silent", number("silent", ",")),
)


@dataclass(frozen=True)
class UpdateSettings:
    """How much ``reproduce dictionary-update`` does."""

    model: str = "embedded"
    """Language model whose activations are learned."""
    tokens: int = 400_000
    """Activation vectors to learn from."""
    held_out: int = 16_384
    """Activation vectors of other documents that the samples are drawn from."""
    samples: int = 4096
    """Held-out vectors to measure on."""
    adam_steps: tuple[int, ...] = (50, 100, 200, 400, 800, 1600)
    """Lengths of the runs of preset `pursuit`, each with its whole learning-rate schedule."""
    batch_size: int = 1024
    """Activation vectors in each step of Adam."""
    round_rows: tuple[int, ...] = (8192, 32_768, 131_072)
    """Activation vectors that a round of the alternation codes; one curve for each."""
    rounds: tuple[int, ...] = (24, 12, 6)
    """Rounds of each curve."""
    polish_rows: int = 65_536
    """Activation vectors of the one exact update after every run of Adam."""
    degrees: tuple[int, ...] = (7, 30)
    """An expander for each."""
    d_sae: int = 4608
    """Features."""
    k: int = 32
    """Features per sample."""
    seeds: tuple[int, ...] = (0,)
    """Runs of everything."""


LAPTOP = UpdateSettings()
SMOKE = UpdateSettings(
    tokens=4096, held_out=2048, samples=256, adam_steps=(10, 20), batch_size=64, round_rows=(256,), rounds=(2,),
    polish_rows=512, degrees=(3,), d_sae=64, k=4,
)  # fmt: skip
PAPER = replace(
    LAPTOP, model="pythia-70m", tokens=1_280_000, degrees=(7, 30, 50, 100, 200), d_sae=4096, k=64, seeds=(0, 1, 2)
)


def run_dictionary_update(settings: UpdateSettings, out: Path) -> Finding:
    """Learn the same expander SAEs both ways from the same start.

    Codes are those of preset ``pursuit`` throughout (matching pursuit with a refit). The clock runs while the
    dictionary is learned, not while it is measured.
    """
    subject = Subject.of(settings.model)
    store, test = subject.activations(settings.tokens), subject.activations(settings.held_out, "heldout")
    held_out = TensorSource(test.sample(min(settings.samples, len(test)), 0).float())
    cells = Cells(out, without_seeds(settings) | {"torch_threads": torch.get_num_threads()})
    rows: list[dict[str, Any]] = []
    for seed in settings.seeds:
        for degree in settings.degrees:
            arm = {"preset": "pursuit", "d_sae": settings.d_sae, "degree": degree, "k": settings.k, "seed": seed}
            facts = {"degree": degree, "seed": seed}
            for steps in settings.adam_steps:
                key = f"adam, d={degree}, seed={seed}, {steps} steps"
                found = cells.get(key, lambda steps=steps, a=arm: list(_adam(a, steps, settings, store, held_out)))
                rows += [facts | row for row in found]
            for per_round, rounds in zip(settings.round_rows, settings.rounds, strict=True):
                key = f"exact, d={degree}, seed={seed}, {per_round} rows, {rounds} rounds"
                found = cells.get(key, lambda r=per_round, n=rounds, a=arm: list(_exact(a, r, n, store, held_out)))
                rows += [facts | row for row in found]
    notes = [
        f"Expander, n={settings.d_sae}, k={settings.k}; signed codes by matching pursuit with a refit; FVU of "
        f"{len(held_out):,} held-out vectors under that encoder and under OMP (by magnitude). Adam: whole runs of "
        f"preset `pursuit`, {settings.batch_size:,} vectors in each step. Exact: encode so many vectors, solve for W "
        "and b_dec, again on others. Adam + exact: one update after the run.",
        f"Seconds of learning, {torch.get_num_threads()} threads. Silent: features that coded no held-out vector.",
    ]
    return Finding(rows, f"The dictionary by Adam and by exact updates, {subject}", notes)


def _adam(
    arm: dict[str, Any], steps: int, settings: UpdateSettings, store: ActivationSource, held_out: TensorSource
) -> Iterator[dict[str, Any]]:
    recipe = resolve(arm, {"steps": steps, "batch_size": settings.batch_size})
    # The first steps of a process load kernels and make buffers: they would count against the shortest run.
    train(build_sae(recipe.sae, store), store, replace(recipe.train, steps=3), description="Warm up")
    sae = build_sae(recipe.sae, store)
    began = time.perf_counter()
    train(sae, store, recipe.train, description=f"Adam, d={arm['degree']}")
    seconds = time.perf_counter() - began
    coded = steps * settings.batch_size
    yield {"method": "Adam", "amount": steps, "coded": coded, "seconds": seconds} | _measured(sae, held_out)
    began = time.perf_counter()
    refit_dictionary(sae, store, rows=settings.polish_rows, seed=arm["seed"])
    seconds += time.perf_counter() - began
    amount = {"amount": steps, "coded": coded + settings.polish_rows, "seconds": seconds}
    yield {"method": "Adam + exact"} | amount | _measured(sae, held_out)


def _exact(
    arm: dict[str, Any], rows: int, rounds: int, store: ActivationSource, held_out: TensorSource
) -> Iterator[dict[str, Any]]:
    sae = build_sae(resolve(arm).sae, store)
    seconds, began = 0.0, time.perf_counter()
    with torch.no_grad():  # as preset `pursuit` starts
        sae.b_dec.copy_(mean_and_variance(store, arm["seed"])[0])
    with progress(f"Exact, d={arm['degree']}, {rows:,} rows", rounds, "round") as advance:
        for done, _ in enumerate(alternate(sae, store, rounds, rows=rows, seed=arm["seed"])):
            seconds += time.perf_counter() - began
            advance(1)
            amount = {"amount": done + 1, "coded": rows * (done + 1), "seconds": seconds}
            yield {"method": f"exact, {rows:,} in each round"} | amount | _measured(sae, held_out)
            began = time.perf_counter()


def _measured(sae: SAE, held_out: TensorSource) -> dict[str, Any]:
    own = reconstruction(sae, held_out)
    return {"fvu": own.fvu, "silent": own.silent, "omp_fvu": reconstruction(sae.with_encoder("omp"), held_out).fvu}


def plot_dictionary_update(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """FVU against seconds of learning, a panel for each degree, a line for each way of learning and seed.

    ``rows`` have ``degree``, ``seed``, ``method``, ``seconds`` and ``fvu``; the seeds of one way look alike.
    """
    degrees, methods = sorted({row["degree"] for row in rows}), list(dict.fromkeys(row["method"] for row in rows))
    figure, (panels,) = picture.panels(len(degrees))
    for axes, degree in zip(panels, degrees, strict=True):
        for place, method in enumerate(methods):
            for seed in sorted({row["seed"] for row in rows}):
                line = [row for row in rows if (row["degree"], row["method"], row["seed"]) == (degree, method, seed)]
                look = picture.style(place).line()
                axes.plot([row["seconds"] for row in line], [row["fvu"] for row in line], label=method, **look)
        axes.set_xscale("log")
        axes.set_xlabel("seconds of learning")
        axes.set_title(f"d = {degree}", fontsize=10)
    panels[0].set_ylabel("FVU on held-out activations")
    picture.legend(figure)
    figure.suptitle(title)
    return figure


register(
    Experiment(
        name="dictionary-update",
        question="Is the dictionary learned sooner by Adam or by exact least squares?",
        sizes={"smoke": SMOKE, "laptop": LAPTOP, "paper": PAPER},
        run=run_dictionary_update,
        columns=COLUMNS,
        picture=plot_dictionary_update,
    )
)
