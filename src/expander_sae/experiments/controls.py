"""``reproduce controls``: the same SAE on other supports, and in other bases: what does the expander mask contribute?

Values, budget and schedule are the same in every arm; only the supports differ, or the coordinates they lie in
(:mod:`~expander_sae.experiments.common.supports`). Differences from left-regular masks are taken seed by seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expander_sae.evaluation import InModel
from expander_sae.experiments.common import published
from expander_sae.experiments.common.answer import answer
from expander_sae.experiments.common.paired import paired, what_seeds_can_show
from expander_sae.experiments.common.results import Finding
from expander_sae.experiments.common.resume import Cells
from expander_sae.experiments.common.seeds import over_seeds, without_seeds
from expander_sae.experiments.common.subject import Subject, sae_hash
from expander_sae.experiments.common.supports import (
    ARMS,
    LEARNED,
    REFERENCE,
    Supports,
    arm_named,
    mask_of,
    not_to_be_had,
    published_rows,
    refusal,
)
from expander_sae.experiments.registry import Experiment, register
from expander_sae.report import picture
from expander_sae.report.table import DASH, Column, Row, number, spread, text
from expander_sae.sae import SAE
from expander_sae.theory import coherence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READINGS = ("", "omp_", "signed_omp_")
_CERTIFIED_UP_TO = 8  # trained columns certify 0 or 1
MEASURED = tuple(f"{reading}{figure}" for reading in READINGS for figure in ("relative_error", "fvu", "ce_recovered"))
FIGURES = (*MEASURED, "dead_share", "overlap_max", "overlap_mean", "rows_unused", "mu", "certified", "train_seconds")


def _against(row: Row) -> str:
    if row.get("fvu_against") is None:
        return DASH
    p = "" if row["fvu_p"] is None else f", p {row['fvu_p']:.3f}"
    return f"{row['fvu_against']:+.1%}{p}"


COLUMNS = (
    Column("supports", text("name")),
    Column("trained", lambda row: f"{row['preset']}, d={row['degree']}", words=True),
    Column("rel. error", spread("relative_error", ".3f")),
    Column("rel. error, signed OMP", spread("signed_omp_relative_error", ".3f")),
    Column("FVU against left-regular", _against),
    Column("CE recovered", spread("ce_recovered", ".3f")),
    Column("dead", number("dead_share", ".1%")),
)
DETAILS = (
    Column("supports", text("name")),
    Column("trained", lambda row: f"{row['preset']}, d={row['degree']}", words=True),
    Column("FVU", spread("fvu", ".3f")),
    Column("FVU, OMP (magnitude)", spread("omp_fvu", ".3f")),
    Column("FVU, OMP (signed)", spread("signed_omp_fvu", ".3f")),
    Column("rows two columns share: most, mean", lambda row: _pair(row, "overlap_max", ".0f", "overlap_mean", ".2f")),
    Column("μ trained, certified k", lambda row: _pair(row, "mu", ".3f", "certified", ".1f")),
)


def _pair(row: Row, first: str, first_spec: str, second: str, second_spec: str) -> str:
    both = [number(first, first_spec)(row), number(second, second_spec)(row)]
    return DASH if DASH in both else ", ".join(both)


@dataclass(frozen=True)
class ControlsSettings:
    """How much ``reproduce controls`` does."""

    model: str = "embedded"
    """Language model whose activations are read."""
    tokens: int = 300_000
    """Activation vectors to train on."""
    windows: int = 4
    """Held-out windows the SAEs are evaluated on, in the model."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Supports compared; `learned` also trains a dense SAE for each preset and seed, for as many steps."""
    degrees: tuple[int, ...] = (7, 30, 100)
    """Rows each column uses."""
    steps: dict[str, int] = field(default_factory=lambda: {"paper-stable": 1500, "pursuit": 200})
    """Steps of every training, by preset. `paper-stable` is the paper's recipe but for `b_dec`, which starts at the
    mean: from zero it cannot reach the mean of this model's activations, the less so the fewer coordinates the mean
    lies on, and bases would be compared by that."""
    batch_sizes: dict[str, int] = field(default_factory=lambda: {"paper-stable": 256, "pursuit": 1024})
    """Activation vectors in each step, by preset."""
    costly_degree: int = 100
    """From this degree on a step of a pursuit costs as much as a dense one, and less is trained by pursuits:"""
    costly_steps: int = 60
    """so many steps"""
    costly_arms: tuple[str, ...] = ("left-regular", "clustered", "learned", "pca-basis")
    """of these arms alone."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of everything: mask, initial values, order, random rotation."""
    d_sae: int = 2304
    """Features of every SAE."""
    k: int = 32
    """Features per sample."""

    def __post_init__(self) -> None:
        for name in (*self.arms, *self.costly_arms):
            arm_named(name)
        if REFERENCE not in self.arms:
            raise ValueError(f"arms must name {REFERENCE!r}: the others are compared with it")
        if self.steps.keys() != self.batch_sizes.keys():
            raise ValueError("steps and batch_sizes must name the same presets")

    def runs(self) -> list[tuple[str, int, str]]:
        """Every ``(preset, degree, arm)``."""
        found = []
        for preset in self.steps:
            for degree in self.degrees:
                chosen = [arm for arm in self.arms if arm in self.costly_arms or not self.costly(preset, degree)]
                found += [(preset, degree, arm) for arm in chosen]
        return found

    def costly(self, preset: str, degree: int) -> bool:
        """Whether less is done."""
        return preset.startswith("pursuit") and degree >= self.costly_degree


LAPTOP = ControlsSettings()
SMOKE = ControlsSettings(
    tokens=4096, windows=1, arms=("left-regular", "clustered", "learned", "random-basis", "pca-basis-weighted"),
    degrees=(3,), steps={"paper-stable": 4, "pursuit": 3}, batch_sizes={"paper-stable": 32, "pursuit": 32},
    seeds=(0, 1), d_sae=48, k=3,
)  # fmt: skip
PAPER = replace(
    LAPTOP, model="pythia-70m", tokens=1_280_000, windows=64, steps={"paper": 5000, "pursuit": 2000},
    batch_sizes={"paper": 256, "pursuit": 1024}, costly_degree=513, d_sae=4096, k=64, degrees=(7, 30, 50, 100, 200),
)  # fmt: skip


def run_controls(settings: ControlsSettings, out: Path) -> Finding:
    """Train every arm and read it in the model; one row for each preset, degree and arm, and the paper's rows below."""
    subject = Subject.of(settings.model)
    store = subject.activations(settings.tokens)
    cells = Cells(out, {k: v for k, v in without_seeds(settings).items() if k not in ("arms", "degrees")})
    training = {
        preset: {"steps": steps, "batch_size": settings.batch_sizes[preset]} for preset, steps in settings.steps.items()
    }
    supports = Supports(store, out, settings.d_sae, settings.k, training)
    rows, refused = [], {}
    for preset, degree, name in settings.runs():
        mask = ARMS[name].mask
        why = None if mask == LEARNED else refusal(mask, store.d_in, settings.d_sae, degree)
        if why is not None:
            refused[f"{name} at d = {degree}"] = why
            continue
        changes = {"steps": settings.costly_steps} if settings.costly(preset, degree) else {}
        for seed in settings.seeds:
            key = f"{name}-{preset}-d{degree}-seed{seed}"
            facts = {"name": name, "preset": preset, "degree": degree, "seed": seed}

            def one(key: str = key, facts: dict[str, Any] = facts, changes: dict[str, int] = changes) -> dict[str, Any]:
                where = (facts["preset"], facts["degree"], facts["seed"])
                sae = supports.sae(key, ARMS[facts["name"]], *where, changes)
                return measure(subject, sae, settings.windows)

            rows.append(facts | cells.get(key, one, lambda key=key: sae_hash(out / key)))
    table = compared(rows)
    notes = _notes(settings, subject, table, refused)
    theirs = [row | {"preset": "paper"} for row in published_rows(published.controls())]
    return Finding(table + theirs, f"The same SAE on other supports, {subject}", notes)


def measure(subject: Subject, sae: SAE, windows: int) -> dict[str, Any]:
    """Figures of one SAE: in the model under its own encoder and both OMPs, and of its supports."""
    readers = {"": sae, "signed_omp_": sae.with_encoder("omp", signed=True)}
    if sae.encoder.ranks_features:  # a pursuit that refits is as good as OMP by magnitude already
        readers["omp_"] = sae.with_encoder("omp")
    found = subject.read(readers, windows)
    row: dict[str, Any] = {}
    for reading, result in found.items():
        row |= {f"{reading}{name}": value for name, value in _figures(result).items()}
    mask = mask_of(sae)
    overlap, summary = mask.overlap(), sae.metadata["training"]
    known = coherence(sae.dictionary.matrix(), _CERTIFIED_UP_TO)
    return row | {
        "tokens": found[""].reconstruction.tokens,
        "signed": sae.signed,
        "num_values": sae.num_values,
        "dead_share": summary["dead"] / sae.d_sae,
        "steps": summary["steps"],
        "train_seconds": summary["seconds"],
        "overlap_max": overlap.maximum,
        "overlap_mean": overlap.mean,
        "rows_unused": int((mask.row_degrees() == 0).sum()),
        "mu": float(known.mu),
        "certified": known.omp_level,
    }


def _figures(result: InModel) -> dict[str, float | None]:
    found = result.reconstruction
    return {"relative_error": found.relative_error, "fvu": found.fvu, "ce_recovered": result.ce_recovered}


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm over seeds, with the paired change of FVU and of CE recovered against left-regular masks.

    The change of FVU is a fraction of the reference's mean FVU. ``by_seed`` keeps both figures of every seed.
    """
    merged = over_seeds(rows, ("preset", "degree", "name"), FIGURES)
    for row in merged:
        of_arm = {one["seed"]: one for one in rows if _same(one, row) and one["name"] == row["name"]}
        reference = {one["seed"]: one for one in rows if _same(one, row) and one["name"] == REFERENCE}
        row["by_seed"] = {str(seed): {key: one[key] for key in ("fvu", "ce_recovered")} for seed, one in of_arm.items()}
        if row["name"] == REFERENCE:
            continue
        for figure in ("fvu", "ce_recovered"):
            both = [
                {s: one[figure] for s, one in part.items() if one[figure] is not None} for part in (of_arm, reference)
            ]
            if not both[0].keys() & both[1].keys():
                continue
            change = paired(*both)
            unit = sum(both[1].values()) / len(both[1]) if figure == "fvu" else 1.0
            row |= {f"{figure}_against": change.mean / unit, f"{figure}_p": change.p}
    return merged


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return (first["preset"], first["degree"]) == (second["preset"], second["degree"])


def _notes(
    settings: ControlsSettings, subject: Subject, table: Sequence[dict[str, Any]], refused: dict[str, str]
) -> list[str]:
    steps = ", ".join(
        f"{count:,} of {settings.batch_sizes[preset]:,} with `{preset}`" for preset, count in settings.steps.items()
    )
    d_in = subject.activations(settings.tokens).d_in
    notes = [
        answer(table),
        what_seeds_can_show(len(settings.seeds)) + " The p beside a change is that of its own preset and degree, not "
        "corrected for the number of rows; the answer above takes the mean over degrees for each seed first, and "
        "corrects for the number of arms under a preset (Holm).",
        f"{settings.d_sae:,} features, k = {settings.k}, d·n values in every arm (on average with bernoulli masks); "
        f"steps: {steps}; figures on {table[0]['tokens']:,} held-out positions, the same for all; ± is the deviation "
        f"over {len(settings.seeds)} seeds. Codes are signed under every preset and OMP. Dead: features without a fire "
        "in the last 100,000 training samples. μ: largest inner product of two trained columns; certified: the k up to "
        "which μ₁ guarantees that OMP finds every code.",
        "Rows of weighted masks are drawn in proportion to the standard deviation of the coordinate. A basis is part "
        f"of the SAE: {d_in:,}² values more than in the other arms, which `num_values` in results.json counts.",
    ]
    if LEARNED in settings.arms:
        notes.append(
            "Learned supports: the d largest entries of each column of a dense SAE of the same width, trained with the "
            "same preset for as many steps, then retuned like the other arms: twice their steps, the first half at "
            "dense cost, and its supports are stored beside the values (the paper's pruned_retuned_dense)."
        )
    short = [preset for preset in settings.steps for d in settings.degrees if settings.costly(preset, d)]
    if short:
        notes.append(
            f"From d = {settings.costly_degree} on pursuits train {', '.join(settings.costly_arms)} only, for "
            f"{settings.costly_steps} steps."
        )
    notes += not_to_be_had(refused)
    notes.append(
        f"The last rows are the paper's own figures (arXiv 2607.01799; {published.WHERE}), on another model and with "
        "CE by another convention: compare differences between its rows, not its rows with ours."
    )
    return notes


def plot_controls(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """FVU of every arm: a panel for each preset (down) and degree (across), own encoder full, signed OMP hollow.

    ``rows`` have ``name``, ``preset``, ``degree``, ``fvu`` and ``signed_omp_fvu``; the ``published`` are left out.
    """
    rows = [row for row in rows if not row.get("published")]
    presets, degrees, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("preset", "degree", "name"))
    figure, grid = picture.panels(len(degrees), len(presets), width=4.2, height=1.4 + 0.3 * len(names))
    for line, preset in zip(grid, presets, strict=True):
        for axes, degree in zip(line, degrees, strict=True):
            panel = {row["name"]: row for row in rows if (row["preset"], row["degree"]) == (preset, degree)}
            for number_, (key, label) in enumerate((("fvu", "own encoder"), ("signed_omp_fvu", "OMP (signed)"))):
                look = picture.style(number_)
                at = [(row[key], names.index(name)) for name, row in panel.items()]
                axes.plot(*zip(*at, strict=True), label=label, **look.points(hollow=number_ == 1))
                spread_ = [row.get(f"{key}_sd") or 0.0 for row in panel.values()]
                axes.errorbar(*zip(*at, strict=True), xerr=spread_, fmt="none", ecolor=look.colour)
                axes.axvline(panel[REFERENCE][key], color=look.colour, ls=look.dash, lw=0.8)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_title(f"{preset}, d = {degree}", fontsize=10)
        for axes in line[1:]:
            axes.tick_params(labelleft=False)
    for axes in grid[-1]:
        axes.set_xlabel("FVU (lower is better)")
    picture.legend(figure)
    figure.suptitle(title)
    return figure


register(
    Experiment(
        name="controls",
        question="Does expansion of the supports matter, or only their sparsity and diversity, or the basis?",
        sizes={"smoke": SMOKE, "laptop": LAPTOP, "paper": PAPER},
        run=run_controls,
        columns=COLUMNS,
        picture=plot_controls,
        details=DETAILS,
    )
)
