"""``reproduce geometry``: the paper's diagnostics of trained dictionaries, with both ends of what is only bracketed.

``β_j = √d max |w_ij|`` of unit columns; ``μ₁(k)``; ``ε`` of sets of up to ``k + 1`` and ``2k`` columns;
``R_id = 2β²ε(2k)`` and ``R_OMP = β²ε(k+1)(2k+1)``, below 1 where the paper's theorems say something (docs/theory.md).
The paper's ``ε`` are the worst sets that a search found: the lower ends, which can refute and never prove.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expander_sae.experiments.common import published
from expander_sae.experiments.common.results import Finding
from expander_sae.experiments.common.seeds import over_seeds
from expander_sae.experiments.common.subject import Subject
from expander_sae.experiments.common.supports import ArmsSettings, TrainedArms, mask_of, published_rows
from expander_sae.experiments.registry import Experiment, register
from expander_sae.report import picture
from expander_sae.report.table import DASH, Column, Row, number, spread
from expander_sae.sae import SAE
from expander_sae.theory import certify, flatness

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDS = ("eps_omp", "eps_id", "r_omp", "r_id")
FIGURES = (
    "beta_median", "beta_95", "beta_max", "mu", "mu1", "fvu",
    *(f"{name}_{end}" for name in ENDS for end in ("lower", "upper")),
    "certified", "unique", "row_degree_least", "row_degree_most",
)  # fmt: skip


def _ends(name: str, spec: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        lower, upper = (number(f"{name}_{end}", spec)(row) for end in ("lower", "upper"))
        return lower if lower == upper else f"≥ {lower}" if upper == DASH else f"{lower} to {upper}"

    return show


def _flatness(row: Row) -> str:
    return ", ".join(number(f"beta_{name}", ".2f")(row) for name in ("median", "95", "max"))


COLUMNS = (
    Column("supports", lambda row: f"{row['name']}, d={row['degree']}"),
    Column("β: median, 95 %, largest", _flatness),
    Column("μ₁(k)", spread("mu1", ".1f")),
    Column("ε(k+1)", _ends("eps_omp", ".3f")),
    Column("ε(2k)", _ends("eps_id", ".3f")),
    Column("R_OMP", _ends("r_omp", ",.0f")),
    Column("R_id", _ends("r_id", ",.1f")),
)
DETAILS = (
    Column("supports", lambda row: f"{row['name']}, d={row['degree']}"),
    Column("μ", number("mu", ".3f")),
    Column("certified k: OMP", number("certified", ".0f")),
    Column("certified k: unique", number("unique", ".0f")),
    Column("columns on a row: least", number("row_degree_least", ".0f")),
    Column("columns on a row: most", number("row_degree_most", ".0f")),
    Column("FVU in training", number("fvu", ".3f")),
)


@dataclass(frozen=True)
class GeometrySettings(ArmsSettings):
    """The SAEs of ``reproduce geometry``."""

    exact_up_to: int = 3
    """Sets of columns up to this size are searched exhaustively."""


LAPTOP = GeometrySettings()
SMOKE = GeometrySettings(
    tokens=4096, masks=("left-regular", "learned"), degrees=(3,), steps=4, batch_size=32, seeds=(0,), d_sae=48, k=3
)  # fmt: skip
PAPER = replace(
    LAPTOP, model="pythia-70m", tokens=1_280_000, masks=("left-regular", "clustered", "learned"), preset="paper",
    steps=5000, d_sae=4096, k=64, degrees=(7, 30, 50, 100, 200),
)  # fmt: skip


def run_geometry(settings: GeometrySettings, out: Path) -> Finding:
    """Train and diagnose; one row for each kind of supports and degree over seeds, the paper's rows below."""
    subject = Subject.of(settings.model)
    arms = TrainedArms(subject, settings, out)
    found = arms.figures(lambda sae, seed: diagnose(sae, settings.k, settings.exact_up_to))
    rows = [facts | figures for facts, figures in found]
    table = over_seeds(rows, ("name", "degree"), FIGURES)
    notes = [
        f"Means over {len(settings.seeds)} seeds; k = {settings.k}; {settings.steps:,} steps of "
        f"{settings.batch_size} with `{settings.preset}`, signed codes. β: √d times the largest entry of a unit "
        "column, between 1 (flat) and √d (one coordinate). Where an ε or a ratio R is not exact both ends stand: no "
        "set is worse than the upper, some set is as bad as the lower.",
        _verdict(table, settings.k),
        *arms.refused(),
        f"The last rows are the paper's (arXiv 2607.01799; {published.WHERE}); its ε and R are lower ends, from the "
        "worst set that its search found.",
    ]
    return Finding(table + published_rows(published.geometry()), f"Geometry of trained dictionaries, {subject}", notes)


def diagnose(sae: SAE, k: int, exact_up_to: int) -> dict[str, Any]:
    """The paper's diagnostics of one SAE on a mask, and what is certified of it."""
    certificate = certify(sae.dictionary, k, exact_up_to=exact_up_to)
    beta = flatness(sae.dictionary.matrix())
    assert beta is not None, "an SAE on a mask has sparse columns"
    beta = beta[~beta.isnan()]
    use = mask_of(sae).row_degrees()
    row: dict[str, Any] = {
        "beta_median": float(beta.median()),
        "beta_95": float(beta.quantile(0.95)),
        "beta_max": float(beta.max()),
        "mu": float(certificate.coherence.mu),
        "mu1": float(certificate.coherence.at(k)),
        "certified": certificate.omp_level,
        "unique": certificate.unique_level,
        "row_degree_least": int(use.min()),
        "row_degree_most": int(use.max()),
        "fvu": sae.metadata["training"]["fvu"],
        "signed": sae.signed,
    }
    found = (certificate.expansion(k + 1), certificate.expansion(min(2 * k, sae.d_sae)))
    for name, ends in zip(ENDS, (*found, certificate.r_omp(k), certificate.r_id(k)), strict=True):
        for end, value in zip(("lower", "upper"), ends or (None, None), strict=True):
            row[f"{name}_{end}"] = None if value is None else float(value)
    return row


def _verdict(rows: Sequence[dict[str, Any]], k: int) -> str:
    ratios = [row[name] for row in rows for name in ("r_omp_lower", "r_id_lower") if row[name] is not None]
    certified = f"{min(row['certified'] for row in rows):.3g} to {max(row['certified'] for row in rows):.3g}"
    if not ratios:
        return f"OMP is certified up to k = {certified}; the SAEs use {k}."
    known = "none is" if min(ratios) >= 1 else "not all are"
    return (
        f"The paper's theorems ask for R below 1. Its lower ends here are {min(ratios):,.2g} to {max(ratios):,.2g}: "
        f"{known} refuted by less. OMP is certified for every code of up to k = {certified} features (mean over "
        f"seeds); the SAEs use {k}."
    )


def plot_geometry(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """``μ₁(k)``, median flatness and the lower ends of both ratios against the degree, a line for each kind.

    ``rows`` have ``name``, ``degree`` and the figures; those of the paper are hollow.
    """
    panels = (
        ("mu1", "μ₁(k)"),
        ("beta_median", "median β"),
        ("r_omp_lower", "R_OMP, lower end"),
        ("r_id_lower", "R_id, lower end"),
    )
    figure, (line,) = picture.panels(len(panels), width=3.8, height=3.6)
    names = list(dict.fromkeys(row["name"] for row in rows))
    for axes, (key, label) in zip(line, panels, strict=True):
        for place, name in enumerate(names):
            here = sorted((row["degree"], row[key]) for row in rows if row["name"] == name and row.get(key) is not None)
            if here:
                look = picture.style(place).line()
                look |= {"markerfacecolor": "white"} if name.startswith("the paper") else {}
                axes.plot(*zip(*here, strict=True), label=name, **look)
        if key.startswith("r_"):
            axes.axhline(1, color="0.4", lw=0.8)
            axes.set_yscale("log")
        axes.set_xscale("log")
        axes.set_xlabel("degree d")
        axes.set_ylabel(label)
    picture.legend(figure)
    figure.suptitle(title)
    return figure


register(
    Experiment(
        name="geometry",
        question="How far are trained dictionaries from what the paper's theorems ask of them?",
        sizes={"smoke": SMOKE, "laptop": LAPTOP, "paper": PAPER},
        run=run_geometry,
        columns=COLUMNS,
        picture=plot_geometry,
        details=DETAILS,
    )
)
