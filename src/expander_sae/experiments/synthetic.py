"""``reproduce synthetic``: planted codes on every family of masks, the supports found by OMP, and what is certified.

The paper's experiment (``synthetic_omp_recovery`` of its author) on left-regular masks, and ours on others: ``k``
features with Gaussian coefficients, flat columns with random signs, noise of ``σ/√m`` times the signal's norm in each
coordinate. OMP takes ``k`` steps by magnitude; a problem counts where it finds exactly the planted features.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import fisher_exact
from torch import Tensor

from expander_sae.dictionary import Matrix
from expander_sae.experiments.common import published
from expander_sae.experiments.common.planted import random_code, random_matrix, wilson
from expander_sae.experiments.common.results import Finding
from expander_sae.experiments.common.resume import Cells
from expander_sae.experiments.common.supports import not_to_be_had, refusal
from expander_sae.experiments.registry import Experiment, register
from expander_sae.mask import CONSTRUCTIONS, Mask
from expander_sae.progress import progress
from expander_sae.pursuit import solver
from expander_sae.registry import unknown
from expander_sae.report import picture
from expander_sae.report.table import DASH, Column, Row, number, text
from expander_sae.theory import coherence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPERS = "left-regular"
LEVEL = 0.01
"""Chance of a false alarm for each comparison with the paper."""
OFTEN = 0.95
_CERTIFIED_UP_TO = 64  # no mask of sizes of interest certifies more: it would need μ₁(64) + μ₁(63) < 1


def _at_each_k(key: str, spec: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        found = [point.get(key) for point in row["points"]]
        return DASH if None in found or not found else " ".join(format(one, spec) for one in found)

    return show


COLUMNS = (
    Column("mask", text("mask")),
    Column("d", text("degree")),
    Column("noise", number("noise", "g")),
    Column("certified k", text("certified")),
    Column("found k, 95 %", text("found")),
    Column("found k, 50 %", text("half")),
    Column("as the paper", text("agreement"), words=True),
)
DETAILS = (
    Column("mask", text("mask")),
    Column("d", text("degree")),
    Column("noise", number("noise", "g")),
    Column("k", lambda row: " ".join(str(point["k"]) for point in row["points"]) or DASH, words=True),
    Column("found", _at_each_k("rate", ".2f"), words=True),
    Column("found, the paper", _at_each_k("paper_rate", ".2f"), words=True),
    Column("agrees", _at_each_k("agrees", ""), words=True),
)


@dataclass(frozen=True)
class SyntheticSettings:
    """The problems of ``reproduce synthetic``."""

    d_in: int = 512
    """Rows ``m``; with 512 x 4096 the paper's figures stand beside those of left-regular masks."""
    d_sae: int = 4096
    """Columns ``n``."""
    degrees: tuple[int, ...] = (7, 30, 50, 100, 200)
    """Rows each column uses, on left-regular masks."""
    masks: tuple[str, ...] = (
        "balanced", "reed-solomon", "gf2", "clustered", "shared", "banded", "hub", "bernoulli", "weighted",
    )  # fmt: skip
    """Other kinds of masks, at `mask_degrees`; one that does not exist at a size has no figures."""
    mask_degrees: tuple[int, ...] = (7, 8, 16, 30)
    """Rows each column uses, on the other masks and again on left-regular ones."""
    ks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    """Planted features per problem."""
    noises: tuple[float, ...] = (0.0, 0.01, 0.05)
    """Expected norm of the noise as a fraction of the signal's."""
    trials: int = 50
    """Problems for each mask, `k` and noise."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Masks of each kind, with values and problems of their own."""

    def __post_init__(self) -> None:
        for kind in self.masks:
            if kind not in CONSTRUCTIONS:
                raise ValueError(unknown("mask kind", kind, CONSTRUCTIONS))


LAPTOP = SyntheticSettings()
SMOKE = SyntheticSettings(
    d_in=64, d_sae=128, degrees=(4,), masks=("clustered", "reed-solomon"), mask_degrees=(4, 30), ks=(2, 8),
    noises=(0.0, 0.05), trials=6, seeds=(0,),
)  # fmt: skip
PAPER = SyntheticSettings(trials=100, mask_degrees=(7, 8, 16, 30, 50, 100, 200))


def run_synthetic(settings: SyntheticSettings, out: Path) -> Finding:
    """Plant and solve; one row for each kind of mask, degree and noise, the points over ``k`` under ``points``."""
    varied = ("seeds", "degrees", "masks", "mask_degrees", "ks", "noises")
    cells = Cells(out, {name: value for name, value in asdict(settings).items() if name not in varied})
    sizes = [(PAPERS, degree) for degree in dict.fromkeys((*settings.degrees, *settings.mask_degrees))]
    sizes += [(mask, degree) for mask in settings.masks for degree in settings.mask_degrees]
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    with progress("Planted codes", len(sizes) * len(settings.seeds), "mask") as advance:
        for kind, degree in sizes:
            found: dict[tuple[float, int], list[dict[str, Any]]] = {}
            certified: list[int] = []
            why = refusal(kind, settings.d_in, settings.d_sae, degree)
            if why is not None:
                refused[f"{kind} at d = {degree}"] = why
            for seed in settings.seeds if why is None else ():
                _on_one_mask(settings, cells, kind, degree, seed, found, certified)
                advance(1, note=f"{kind} d={degree}")
            rows += [_row(settings, kind, degree, noise, found, certified) for noise in settings.noises]
    notes = [
        f"m = {settings.d_in}, n = {settings.d_sae:,}; {settings.trials} problems for each of {len(settings.seeds)} "
        "masks of a kind, k and noise; flat columns with random signs, Gaussian coefficients: signed codes. Found: OMP "
        "by magnitude finds exactly the planted features; the largest k of the grid at which it does so in 95 and 50 % "
        "of the problems, and at every smaller one. Certified: the largest k with μ₁(k) + μ₁(k-1) < 1, at which it "
        "always does without noise; the least over the masks.",
        _compared(rows),
        *not_to_be_had(refused),
    ]
    return Finding(rows, "Planted codes found by OMP", notes)


def _on_one_mask(
    settings: SyntheticSettings,
    cells: Cells,
    kind: str,
    degree: int,
    seed: int,
    found: dict[tuple[float, int], list[dict[str, Any]]],
    certified: list[int],
) -> None:
    """Fill in what is found on one mask."""
    matrix: list[Matrix] = []

    def drawn() -> Matrix:  # once, and only if something has to be computed
        if not matrix:
            sizes = {"d_in": settings.d_in, "d_sae": settings.d_sae, "degree": degree}
            mask = Mask.build(kind, seed=seed, **sizes)
            matrix.append(random_matrix(mask, "flat", torch.Generator().manual_seed(seed)))
        return matrix[0]

    name = f"{kind} d={degree} seed={seed}"
    certified.append(cells.get(f"{name}: certified", lambda: coherence(drawn(), _CERTIFIED_UP_TO).omp_level))
    for noise in settings.noises:
        for k in settings.ks:
            key = f"{name} k={k} noise={noise}"
            one = cells.get(key, lambda k=k, noise=noise: solve(drawn(), k, noise, settings.trials, seed))
            found.setdefault((noise, k), []).append(one)


def solve(matrix: Matrix, k: int, noise: float, trials: int, seed: int) -> dict[str, Any]:
    """Problems whose features OMP found, of ``trials``, and the mean relative error of its codes."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + 1009 * k + round(1e4 * noise))
    code = random_code(matrix.d_sae, k, trials, "gaussian", generator)
    h = matrix.decode(code)
    level = noise * h.norm(dim=1, keepdim=True) / math.sqrt(matrix.d_in)
    answer = solver("omp")(h + level * torch.randn(h.shape, generator=generator), matrix, k)
    truth = code.to_dense(matrix.d_sae)
    error = (answer.to_dense(matrix.d_sae) - truth).norm(dim=1) / truth.norm(dim=1)
    return {"found": int(same_features(answer.indices, code.indices).sum()), "code_error": float(error.mean())}


def same_features(first: Tensor, second: Tensor) -> Tensor:
    """bool ``(B,)``: whether the rows of two ``(B, k)`` name the same features, in any order."""
    return (first.sort(dim=1).values == second.sort(dim=1).values).all(dim=1)


def _row(
    settings: SyntheticSettings,
    kind: str,
    degree: int,
    noise: float,
    found: dict[tuple[float, int], list[dict[str, Any]]],
    certified: list[int],
) -> dict[str, Any]:
    points = [_point(settings, kind, degree, noise, k, found[noise, k]) for k in settings.ks if (noise, k) in found]
    compared = [point for point in points if "agrees" in point]
    agreeing = sum(point["agrees"] == "yes" for point in compared)
    return {
        "mask": kind,
        "degree": degree,
        "noise": noise,
        "certified": min(certified, default=None),
        "found": largest_found(points, OFTEN),
        "half": largest_found(points, 0.5),
        "agreement": f"{agreeing} of {len(compared)}" if compared else None,
        "points": points,
    }


def _point(
    settings: SyntheticSettings, kind: str, degree: int, noise: float, k: int, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    trials = settings.trials * len(runs)
    successes = sum(run["found"] for run in runs)
    low, high = wilson(successes, trials)
    errors = [run["code_error"] for run in runs]
    point = {"k": k, "found": successes, "trials": trials, "rate": successes / trials, "low": low, "high": high}
    point |= {"code_error": statistics.fmean(errors)}
    theirs = _published(settings, kind, degree, noise, k)
    if theirs is None:
        return point
    test: Any = fisher_exact([[successes, trials - successes], [theirs[0], theirs[1] - theirs[0]]])
    p = float(test.pvalue)
    return point | {"paper_rate": theirs[0] / theirs[1], "p": p, "agrees": "yes" if p >= LEVEL else "no"}


def _published(settings: SyntheticSettings, kind: str, degree: int, noise: float, k: int) -> tuple[int, int] | None:
    same = kind == PAPERS and (settings.d_in, settings.d_sae) == published.SYNTHETIC_SIZE
    known = published.SYNTHETIC.get((degree, noise)) if same else None
    return known[published.SYNTHETIC_KS.index(k)] if known and k in published.SYNTHETIC_KS else None


def largest_found(points: Sequence[dict[str, Any]], share: float) -> int | None:
    """The largest ``k`` up to which every point is found that often; 0 if the first is not."""
    best = 0 if points else None
    for point in points:
        if point["rate"] < share:
            break
        best = point["k"]
    return best


def _compared(rows: Sequence[dict[str, Any]]) -> str:
    compared = [(row, point) for row in rows for point in row["points"] if "agrees" in point]
    if not compared:
        return "The paper has figures for left-regular masks of 512 x 4096 only: none stand beside these."
    other = [
        f"d={row['degree']} noise={row['noise']:g} k={point['k']}" for row, point in compared if point["p"] < LEVEL
    ]
    named = f" ({', '.join(other)})" if other else ""
    return (
        f"The paper's own figures (arXiv 2607.01799): {len(compared) - len(other)} of {len(compared)} agree; "
        f"{len(other)} do not{named}. Agreement: Fisher's exact test of both counts does not reach p = {LEVEL:g}, so "
        f"that {LEVEL * len(compared):.1f} would disagree by chance."
    )


def plot_synthetic(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Share found against ``k``: a panel for each noise and degree, a line for each mask, the certified ``k`` marked.

    ``rows`` have ``mask``, ``degree``, ``noise``, ``certified`` and ``points`` with ``k``, ``rate`` and perhaps
    ``paper_rate``, which is drawn in crosses.
    """
    degrees, noises = sorted({row["degree"] for row in rows}), sorted({row["noise"] for row in rows})
    masks = list(dict.fromkeys(row["mask"] for row in rows))
    figure, grid = picture.panels(len(degrees), len(noises), width=3.6, height=3.0)
    for line, noise in zip(grid, noises, strict=True):
        for axes, degree in zip(line, degrees, strict=True):
            for row in rows:
                if (row["degree"], row["noise"]) != (degree, noise) or not row["points"]:
                    continue
                look = picture.style(masks.index(row["mask"]))
                ks = [point["k"] for point in row["points"]]
                axes.plot(ks, [point["rate"] for point in row["points"]], label=row["mask"], **look.line())
                if row["certified"]:
                    axes.axvline(row["certified"], color=look.colour, ls=look.dash, lw=0.8, alpha=0.6)
                theirs = [(point["k"], point["paper_rate"]) for point in row["points"] if "paper_rate" in point]
                if theirs:
                    axes.plot(*zip(*theirs, strict=True), "kx", label="left-regular, the paper", zorder=5)
            axes.set_xscale("log", base=2)
            axes.set_title(f"d = {degree}, noise {noise:g}", fontsize=10)
        line[0].set_ylabel("supports found")
    for axes in grid[-1]:
        axes.set_xlabel("planted features k; upright: certified")
    picture.legend(figure)
    figure.suptitle(title)
    return figure


register(
    Experiment(
        name="synthetic",
        question="Which planted codes does OMP find on each family of masks, and how many of them are certified?",
        sizes={"smoke": SMOKE, "laptop": LAPTOP, "paper": PAPER},
        run=run_synthetic,
        columns=COLUMNS,
        picture=plot_synthetic,
        details=DETAILS,
    )
)
