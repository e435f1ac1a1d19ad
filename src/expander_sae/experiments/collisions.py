"""``reproduce collisions``: how many rows the active columns of a token touch, against their edges.

The paper's active-support figure: a code of ``k`` columns has ``d·k`` edges and touches fewer rows where supports
collide; ``1 - rows / (d·k)`` is its deficit. Beside it the deficit of as many columns drawn at random, uniformly and as
often as each fires: what of the collisions is the mask's, and what is that of features that fire together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expander_sae.experiments.common import published
from expander_sae.experiments.common.results import Finding
from expander_sae.experiments.common.seeds import over_seeds
from expander_sae.experiments.common.subject import Subject
from expander_sae.experiments.common.supports import ArmsSettings, TrainedArms, mask_of, published_rows
from expander_sae.experiments.registry import Experiment, register
from expander_sae.mask import Mask
from expander_sae.report import picture
from expander_sae.report.table import Column, number, spread, text
from expander_sae.sae import SAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READINGS = ("own encoder", "OMP")
FIGURES = ("coverage", "deficit", "deficit_95", "random", "by_rate", "edges")
COLUMNS = (
    Column("supports", lambda row: f"{row['name']}, d={row['degree']}"),
    Column("read by", text("reading"), words=True),
    Column("edges d·k", number("edges", ",.0f")),
    Column("rows touched", spread("coverage", ".1f")),
    Column("deficit", spread("deficit", ".3f")),
    Column("columns at random", number("random", ".3f")),
    Column("at random, as often as they fire", number("by_rate", ".3f")),
)


@dataclass(frozen=True)
class CollisionsSettings(ArmsSettings):
    """The SAEs of ``reproduce collisions``."""

    held_out: int = 16_384
    """Activation vectors of other documents that the samples are drawn from."""
    samples: int = 2000
    """Held-out vectors whose codes are looked at."""


LAPTOP = CollisionsSettings()
SMOKE = CollisionsSettings(
    tokens=4096, held_out=2048, samples=64, masks=("left-regular", "learned"), degrees=(3,), steps=4, batch_size=32,
    seeds=(0,), d_sae=48, k=3,
)  # fmt: skip
PAPER = replace(
    LAPTOP, model="pythia-70m", tokens=1_280_000, masks=("left-regular", "clustered", "learned"), preset="paper",
    steps=5000, d_sae=4096, k=64, degrees=(7, 50, 200),
)  # fmt: skip


def run_collisions(settings: CollisionsSettings, out: Path) -> Finding:
    """Train and count; one row for each kind of supports, degree and reading over seeds, the paper's rows below."""
    subject = Subject.of(settings.model)
    test = subject.activations(settings.held_out, "heldout")
    h = test.sample(min(settings.samples, len(test)), 0).float()
    arms = TrainedArms(subject, settings, out)
    found = arms.figures(lambda sae, seed: {reading: counted(sae, h, reading, seed) for reading in READINGS})
    rows = [facts | {"reading": reading} | of for facts, figures in found for reading, of in figures.items()]
    table = over_seeds(rows, ("name", "degree", "reading"), FIGURES)
    notes = [
        f"Means over {len(h):,} held-out activations and {len(settings.seeds)} seeds (±: over seeds); k = "
        f"{settings.k}, {settings.steps:,} steps of {settings.batch_size} with `{settings.preset}`; signed codes. "
        "Deficit: 1 - rows touched / edges. At random: as many columns drawn uniformly for each token, and drawn in "
        "proportion to how often each fires on these activations.",
        *_compared(table),
        *arms.refused(),
        f"The last rows are the paper's (arXiv 2607.01799; {published.WHERE}).",
    ]
    theirs = [
        row | {"reading": READINGS[0], "edges": row["degree"] * 64} for row in published_rows(published.collisions())
    ]
    return Finding(table + theirs, f"Rows that active columns touch, {subject}", notes)


@torch.no_grad()
def counted(sae: SAE, h: Tensor, reading: str, seed: int) -> dict[str, float]:
    """Rows touched by the codes of ``h (B, m)``, and by as many columns drawn at random."""
    mask: Mask = mask_of(sae)
    code = (sae if reading == READINGS[0] else sae.with_encoder("omp")).encode(h)
    used = code.values != 0
    edges = mask.degree * used.sum(dim=1)

    def deficits(columns: Tensor) -> Tensor:
        touched = mask.coverage(torch.where(used, columns.to(code.indices), -1))
        return 1 - touched[edges > 0] / edges[edges > 0]

    touched = mask.coverage(torch.where(used, code.indices, -1))
    fires = torch.bincount(code.indices[used].long(), minlength=sae.d_sae).double()
    generator = torch.Generator().manual_seed(seed)
    own, capacity = deficits(code.indices), code.indices.shape[1]
    return {
        "edges": float(edges.double().mean()),
        "coverage": float(touched.double().mean()),
        "deficit": float(own.mean()),
        "deficit_95": float(own.quantile(0.95)),
        "random": float(deficits(drawn(torch.ones_like(fires), len(h), capacity, generator)).mean()),
        "by_rate": float(deficits(drawn(fires, len(h), capacity, generator)).mean()),
    }


def drawn(weights: Tensor, count: int, k: int, generator: torch.Generator) -> Tensor:
    """``(count, k)`` distinct columns, one after the other in proportion to ``weights (n,)``.

    By the largest of ``log w + Gumbel`` noise, which is the same draw (Efraimidis & Spirakis 2006). Where fewer than
    ``k`` weights are positive the others fill up.
    """
    noise = -torch.empty(count, len(weights), dtype=torch.float64).exponential_(generator=generator).log()
    return (weights.clamp_min(1e-12).log() + noise).topk(k, dim=1).indices


def _compared(rows: Sequence[dict[str, Any]]) -> list[str]:
    own = [row for row in rows if row["reading"] == READINGS[0] and row["random"] is not None]
    if not own:
        return []
    parts = [f"{row['name']} d={row['degree']} {row['deficit'] - row['random']:+.3f}" for row in own]
    return ["Deficit of the own encoder's codes above that of columns at random: " + ", ".join(parts) + "."]


def plot_collisions(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Deficit of every row, with both random draws beside it.

    ``rows`` have ``name``, ``degree``, ``reading``, ``deficit`` and perhaps ``random`` and ``by_rate``.
    """
    figure, ((axes,),) = picture.panels(1, width=8, height=1.6 + 0.3 * len(rows))
    keys = (("deficit", "active columns"), ("random", "at random"), ("by_rate", "at random, as often as they fire"))
    for place, (key, label) in enumerate(keys):
        at = [(row[key], number_) for number_, row in enumerate(rows) if row.get(key) is not None]
        if at:
            axes.plot(*zip(*at, strict=True), label=label, **picture.style(place).points(hollow=place > 0))
    axes.set_yticks(range(len(rows)), [f"{row['name']}, d={row['degree']}, {row['reading']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("deficit: 1 - rows touched / edges")
    picture.legend(figure)
    figure.suptitle(title)
    return figure


register(
    Experiment(
        name="collisions",
        question="How many rows do the active columns of a token touch, against as many columns drawn at random?",
        sizes={"smoke": SMOKE, "laptop": LAPTOP, "paper": PAPER},
        run=run_collisions,
        columns=COLUMNS,
        picture=plot_collisions,
    )
)
