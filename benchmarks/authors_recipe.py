"""What our preset ``paper`` does otherwise than the paper's author, measured: one choice of his taken back at a time.

``python -m benchmarks.authors_recipe STORE OUT``, with a finished folder of activations, writes ``OUT.json`` and a
table, ``OUT.md``; interrupted, the same command continues. The choices are those of github.com/rodrgo/expander-sae,
``models/training.py`` and ``models/expander.py`` (598f59a, July 2026).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expander_sae import files
from expander_sae.data import ActivationStore
from expander_sae.data.sources import ActivationSource, TensorSource
from expander_sae.environment import environment
from expander_sae.evaluation import reconstruction
from expander_sae.experiments.common.resume import Cells
from expander_sae.mask import Mask
from expander_sae.report.table import Column, markdown_table, number, spread, text
from expander_sae.sae import SAE
from expander_sae.training import TrainConfig
from expander_sae.training.dead import FeatureUse, resample
from expander_sae.training.recipe import resolve
from expander_sae.training.start import mean_and_variance

HELD_OUT = 20_000
"""Last rows of the store: of other articles, never trained on."""


@dataclass(frozen=True)
class Choices:
    """Where the author's loop differs from ours; all False is ours."""

    last_step: bool = False
    """Re-aim features after the last step, too."""
    after_update: bool = False
    """Count fires, and take the residual to re-aim by, from a second forward pass after the step's update."""
    with_replacement: bool = False
    """Draw each row of a batch from all rows, instead of going through a permutation."""
    patched: bool = False
    """Give every row of the mask that no column uses a place in one."""


OURS, AUTHORS = Choices(), Choices(True, True, True, True)
ARMS = {
    "ours": OURS,
    "re-aimed after the last step, too": Choices(last_step=True),
    "fires and residual from after the update": Choices(after_update=True),
    "rows drawn with replacement": Choices(with_replacement=True),
    "empty rows patched": Choices(patched=True),
    "all four: the author's": AUTHORS,
}


def patched(mask: Mask, seed: int) -> Mask:
    """``mask`` with every row used: a random entry of a random column is exchanged for a row that has none."""
    rows, generator = mask.rows.clone(), torch.Generator().manual_seed(seed)
    while len(empty := empty_rows(Mask(rows, mask.d_in))):
        column = int(torch.randint(mask.d_sae, (1,), generator=generator))
        entry = int(torch.randint(mask.degree, (1,), generator=generator))
        rows[column, entry] = empty[0]  # in no column, so not in this one
        rows[column] = rows[column].sort().values
    return Mask(rows, mask.d_in)


def empty_rows(mask: Mask) -> Tensor:
    """Rows that no column uses."""
    return (torch.bincount(mask.rows.flatten(), minlength=mask.d_in) == 0).nonzero().flatten()


def batches(source: ActivationSource, config: TrainConfig, choices: Choices) -> Iterator[Tensor]:
    """What the steps are taken on."""
    if not choices.with_replacement:
        yield from source.batches(config.batch_size, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        yield source.rows(torch.randint(len(source), (config.batch_size,), generator=generator).numpy())


def train_as(choices: Choices, sae: SAE, source: ActivationSource, config: TrainConfig) -> int:
    """Train ``sae`` in place as the preset ``paper`` and its kin do, but for ``choices``; features re-aimed.

    With :data:`OURS` it is :func:`expander_sae.training.train` bit for bit, but for the guard against divergence; with
    :data:`AUTHORS` his loop, given the same draws (both are tested). The mask is the caller's.
    """
    if config.b_dec_init == "mean":
        with torch.no_grad():
            sae.b_dec.copy_(mean_and_variance(source, config.seed)[0])
    parameters = list(sae.parameters())
    optimiser = torch.optim.Adam(parameters, lr=config.lr, fused=True)
    use, drawn, resampled = FeatureUse(sae.d_sae, sae.b_dec.device), batches(source, config, choices), 0
    for step in range(config.steps):
        h = next(drawn).to(sae.dtype)
        error, residual, code = sae.squared_error(h)
        optimiser.zero_grad(set_to_none=True)
        error.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimiser.param_groups[0]["lr"] = config.lr_at(step)
        optimiser.step()
        if choices.after_update:
            with torch.no_grad():
                _, residual, code = sae.squared_error(h)
        use.count(code.detach())
        if (step + 1) % config.resample_every == 0 and (step + 1 < config.steps or choices.last_step):
            resampled += resample(sae, use, residual, config, step)
    return resampled


def measure(
    store: ActivationSource, held_out: ActivationSource, settings: dict[str, Any], arm: str, seed: int
) -> dict[str, Any]:
    """One run: figures on ``held_out``."""
    recipe, choices = resolve(settings | {"seed": seed}), ARMS[arm]
    sae = recipe.sae.build(store.d_in)
    mask: Mask = sae.dictionary.mask  # type: ignore[attr-defined]
    empty = len(empty_rows(mask))
    if choices.patched and empty:
        # The raw values are independent Gaussians whatever the rows: those of the unpatched mask serve as well.
        values = sae.dictionary.values.detach()
        sae = SAE.expander(patched(mask, seed), sae.k)
        with torch.no_grad():
            sae.dictionary.values.copy_(values)
    resampled = train_as(choices, sae, store, recipe.train)
    found = asdict(reconstruction(sae.eval(), held_out))
    return {"arm": arm, "seed": seed, "empty": empty, "resampled": resampled, **found}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and sample deviation over seeds, as Markdown."""
    figures = ("fvu", "relative_error", "silent", "resampled", "empty")
    joined = []
    for key in dict.fromkeys((row["setting"], row["arm"]) for row in rows):
        same = [row for row in rows if (row["setting"], row["arm"]) == key]
        one: dict[str, Any] = {"setting": key[0], "arm": key[1]}
        for name in figures:
            values = [row[name] for row in same]
            one |= {name: statistics.fmean(values), f"{name}_sd": statistics.stdev(values) if len(same) > 1 else None}
        joined.append(one)
    columns = [
        Column("recipe", text("setting")),
        Column("loop", text("arm"), words=True),
        Column("FVU", spread("fvu", ".4f")),
        Column("rel. error", spread("relative_error", ".4f")),
        Column("silent", spread("silent", ",.0f")),
        Column("re-aimed", spread("resampled", ",.0f")),
        Column("empty rows", number("empty", ".0f")),
    ]
    return markdown_table(joined, columns)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--presets", nargs="+", default=["paper", "paper-stable"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--degree", type=int, default=7)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5000)
    given = parser.parse_args(arguments)
    whole = ActivationStore.open(given.store)
    rows = whole.rows(slice(0, len(whole)))
    store, held_out = TensorSource(rows[:-HELD_OUT]), TensorSource(rows[-HELD_OUT:])
    sizes = {"d_sae": given.d_sae, "degree": given.degree, "k": given.k, "steps": given.steps}
    settings = sizes | {"trained_on": whole.origin(), "held_out": HELD_OUT}
    cells = Cells(given.out.with_suffix(".cells"), settings)
    found: list[dict[str, Any]] = []
    for preset in given.presets:
        for arm in ARMS:
            for seed in given.seeds:
                same = [row for row in found if (row["setting"], row["arm"], row["seed"]) == (preset, "ours", seed)]
                if ARMS[arm] == Choices(patched=True) and not same[0]["empty"]:
                    found.append(same[0] | {"arm": arm})  # there is nothing to patch
                    continue

                def run(preset: str = preset, arm: str = arm, seed: int = seed) -> dict[str, Any]:
                    return measure(store, held_out, {"preset": preset, **sizes}, arm, seed)

                found.append({"setting": preset} | cells.get(f"{preset}, {arm}, seed {seed}", run))
                print(found[-1], file=sys.stderr, flush=True)
    print(table(found))
    result = {"settings": settings, "environment": environment(), "rows": found}
    files.atomic_write_json(given.out.with_suffix(".json"), result)
    files.atomic_write_bytes(given.out.with_suffix(".md"), table(found).encode())


if __name__ == "__main__":
    main()
