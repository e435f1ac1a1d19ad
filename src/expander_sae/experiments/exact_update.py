"""``reproduce dictionary-update``: Adam against exact least-squares updates of the dictionary, error over seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from expander_sae.data.sources import ActivationSource, TensorSource
from expander_sae.evaluation import reconstruction
from expander_sae.experiments.common.cells import Cells
from expander_sae.experiments.common.embedded import PRESET, activations
from expander_sae.experiments.common.record import conclude
from expander_sae.report.pursuit import plot_dictionary_update
from expander_sae.report.table import Column, number
from expander_sae.sae import SAE
from expander_sae.training.exact import alternate, refit_dictionary
from expander_sae.training.recipe import resolve
from expander_sae.training.trainer import mean_and_variance, train

COLUMNS = (
    Column("degree", number("degree", "d")),
    Column("seed", number("seed", "d")),
    Column("update", lambda row: str(row["method"])),
    Column("steps or rounds", number("amount", ",")),
    Column("vectors coded", number("coded", ",")),
    Column("seconds", number("seconds", ",.1f")),
    Column("FVU", number("fvu", ".4f")),
    Column("FVU, OMP", number("omp_fvu", ".4f")),
    Column("silent", number("silent", ",")),
)


@dataclass(frozen=True)
class UpdateSize:
    """How much ``reproduce dictionary-update`` does.

    Attributes:
        tokens: activation vectors to learn from; ``held_out`` in the store, ``samples`` of them to measure on.
        adam_steps: lengths of the runs of preset ``pursuit``, each with its whole learning-rate schedule.
        batch_size: of Adam.
        round_rows: activations a round of the alternation codes; one curve for each.
        rounds: rounds of each curve.
        polish_rows: activations of the one exact update after every run of Adam.
        degrees, d_sae, k, seeds: the expander SAEs.
    """

    tokens: int = 400_000
    held_out: int = 16_384
    samples: int = 4096
    adam_steps: tuple[int, ...] = (50, 100, 200, 400, 800, 1600)
    batch_size: int = 1024
    round_rows: tuple[int, ...] = (8192, 32_768, 131_072)
    rounds: tuple[int, ...] = (24, 12, 6)
    polish_rows: int = 65_536
    degrees: tuple[int, ...] = PRESET.degrees
    d_sae: int = PRESET.d_sae
    k: int = PRESET.k
    seeds: tuple[int, ...] = (0,)


FULL = UpdateSize()
QUICK = replace(
    FULL, samples=1024, adam_steps=(25, 100), round_rows=(8192,), rounds=(4,), polish_rows=16_384, degrees=(7,)
)


def run_dictionary_update(out: str | Path = "runs/dictionary-update", size: UpdateSize = FULL) -> list[dict[str, Any]]:
    """Learn the same expander SAEs both ways from the same start; print and write the table and a picture.

    Codes are those of preset ``pursuit`` throughout (matching pursuit with a refit). The clock runs while the
    dictionary is learned, not while it is measured. Interrupted and started again, it skips finished runs. Writes
    ``results.json``, ``results.md`` and ``dictionary-update.png`` into ``out``.
    """
    out = Path(out)
    store, test = activations(size.tokens), activations(size.held_out, "heldout")
    held_out = TensorSource(test.sample(min(size.samples, len(test)), 0).float())
    cells = Cells(out, {"size": asdict(size), "torch_threads": torch.get_num_threads()})
    print(f"Adam against exact updates on {len(store):,} vectors; results in {out}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for seed in size.seeds:
        for degree in size.degrees:
            settings = {"preset": "pursuit", "d_sae": size.d_sae, "degree": degree, "k": size.k, "seed": seed}
            facts = {"degree": degree, "seed": seed}
            for steps in size.adam_steps:
                key = f"adam, d={degree}, seed={seed}, {steps} steps"
                found = cells.get(key, lambda steps=steps, s=settings: list(_adam(s, steps, size, store, held_out)))
                rows += [facts | row for row in found]
            for per_round, rounds in zip(size.round_rows, size.rounds, strict=True):
                key = f"exact, d={degree}, seed={seed}, {per_round} rows, {rounds} rounds"
                found = cells.get(
                    key, lambda r=per_round, n=rounds, s=settings: list(_exact(s, r, n, size, store, held_out))
                )
                rows += [facts | row for row in found]
    title = f"The dictionary by Adam and by exact updates, {PRESET.hub_id}"
    notes = [
        f"Expander, n={size.d_sae}, k={size.k}; codes by matching pursuit with a refit; FVU of {len(held_out):,} "
        "held-out vectors under that encoder and under OMP. Adam: whole runs of preset `pursuit`, "
        f"{size.batch_size:,} a step. Exact: encode so many vectors, solve for W and b_dec, again on others. "
        "Adam + exact: one update after the run.",
        f"Seconds of learning, {torch.get_num_threads()} threads. Silent: features that coded no held-out vector.",
    ]
    conclude(out, rows, COLUMNS, {"size": asdict(size)}, title, notes, "dictionary-update.png", plot_dictionary_update)
    return rows


def _adam(
    settings: dict[str, Any], steps: int, size: UpdateSize, store: ActivationSource, held_out: TensorSource
) -> Iterator[dict[str, Any]]:
    recipe = resolve(settings, {"steps": steps, "batch_size": size.batch_size})
    sae = recipe.sae.build(store.d_in)
    began = time.perf_counter()
    train(sae, store, recipe.train, description=f"Adam, d={settings['degree']}")
    seconds = time.perf_counter() - began
    coded = steps * size.batch_size
    yield {"method": "Adam", "amount": steps, "coded": coded, "seconds": seconds} | _measured(sae, held_out)
    began = time.perf_counter()
    refit_dictionary(sae, store, rows=size.polish_rows, seed=size.seeds[0])
    seconds += time.perf_counter() - began
    amount = {"amount": steps, "coded": coded + size.polish_rows, "seconds": seconds}
    yield {"method": "Adam + exact"} | amount | _measured(sae, held_out)


def _exact(
    settings: dict[str, Any], rows: int, rounds: int, size: UpdateSize, store: ActivationSource, held_out: TensorSource
) -> Iterator[dict[str, Any]]:
    sae = resolve(settings).sae.build(store.d_in)
    seconds, began = 0.0, time.perf_counter()
    with torch.no_grad():  # as preset `pursuit` starts
        sae.b_dec.copy_(mean_and_variance(store, settings["seed"])[0])
    for done, _ in enumerate(alternate(sae, store, rounds, rows=rows, seed=settings["seed"])):
        seconds += time.perf_counter() - began
        print(
            f"exact, d={settings['degree']}, {rows:,} a round: {done + 1} of {rounds}, {seconds:.1f} s",
            file=sys.stderr,
        )
        amount = {"amount": done + 1, "coded": rows * (done + 1), "seconds": seconds}
        yield {"method": f"exact, {rows:,} a round"} | amount | _measured(sae, held_out)
        began = time.perf_counter()


def _measured(sae: SAE, held_out: TensorSource) -> dict[str, Any]:
    own = reconstruction(sae, held_out)
    return {"fvu": own.fvu, "silent": own.silent, "omp_fvu": reconstruction(sae.with_encoder("omp"), held_out).fvu}
