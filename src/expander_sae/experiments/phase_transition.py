"""``reproduce phase-transition``: where a solver stops recovering planted codes, over ``δ = m/n`` and ``ρ = k/m``.

The empirical protocol of Donoho and Tanner: at every ``(δ, ρ)`` some random problems, success where the code comes
back within a tolerance, and for each ``δ`` a logistic curve ``p(ρ) = 1 / (1 + exp(-b0 (1 - b1 ρ)))`` by maximum
likelihood on the counts, whose 50 % point is ``ρ* = 1 / b1``.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from torch import Tensor

from expander_sae import files
from expander_sae.dictionary import DenseDictionary, Matrix
from expander_sae.experiments.common.planted import Coefficients, Values, random_code, random_matrix, wilson
from expander_sae.experiments.common.results import Finding
from expander_sae.experiments.common.resume import Cells
from expander_sae.experiments.registry import Experiment, register
from expander_sae.mask import CONSTRUCTIONS, Mask
from expander_sae.ops import SparseCode
from expander_sae.progress import progress
from expander_sae.pursuit import check_options, solver
from expander_sae.report.phase import plot_phase_transition
from expander_sae.report.table import Column, number

DENSE = "dense"
_STEEPEST = 1000.0  # b0 of a transition sharper than the grid can tell

COLUMNS = (
    Column("δ = m/n", number("delta", ".3f")),
    Column("m", number("m", ",")),
    Column("ρ at 50 %", lambda row: row["beyond"] or number("rho50", ".3f")(row)),
    Column("k at 50 %", number("k50", ",.0f")),
    Column("ρ at 90 %", number("rho90", ".3f")),
    Column("ρ at 10 %", number("rho10", ".3f")),
)


@dataclass(frozen=True)
class PhaseSettings:
    """The problems of ``reproduce phase-transition`` and who solves them."""

    solver: str = "omp"
    """A pursuit, such as `omp`, `matching-pursuit`, `parallel-l0`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the solver, as `options.block=4`."""
    mask: str = "left-regular"
    """Kind of mask; `dense` is none: independent Gaussian entries."""
    degree: int = 7
    """Rows each column uses."""
    values: Values = "flat"
    """Of the columns, which have unit norm: `flat` is random signs, `binary` all equal."""
    coefficients: Coefficients = "gaussian"
    """Of the planted code; `signs` is ±1."""
    n: int = 1024
    """Columns; `m` and `k` follow from `δ = m/n` and `ρ = k/m`."""
    max_delta: float = 0.5
    """Largest δ of the map."""
    deltas: int = 10
    """Even steps of δ from 0, excluded, to the largest."""
    max_rho: float = 0.6
    """Largest ρ of the map."""
    rhos: int = 20
    """Even steps of ρ likewise."""
    trials: int = 48
    """Problems at each point of the map."""
    draws: int = 4
    """Masks and values that the problems of a point are dealt over."""
    noise: float = 0.0
    """Norm of the noise as a fraction of the signal's."""
    tolerance: float | None = None
    """Relative error up to which a code counts as recovered; by default the larger of .001 and 5 · noise. Small
    coefficients make it matter: OMP at m=512, n=4096, d=7 recovers half of the Gaussian codes up to k=142 at .01, 116
    at .001 and 110 at .0001; of codes of signs up to 52 at any."""
    seed: int = 0
    """Every point draws from it and its own `m` and `k`, whatever else is on the map."""

    def __post_init__(self) -> None:
        check_options(self.solver, self.options)
        known = (*CONSTRUCTIONS, DENSE)
        if self.mask not in known:
            raise ValueError(f"mask must be one of {', '.join(map(repr, known))}, got {self.mask!r}")
        for name in ("max_delta", "max_rho"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        if self.deltas < 1 or self.rhos < 1:
            raise ValueError(f"deltas and rhos must be at least 1, got {self.deltas} and {self.rhos}")
        if not 1 <= self.draws <= self.trials:
            raise ValueError(f"draws must be between 1 and trials = {self.trials}, got {self.draws}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must not be negative, got {self.noise}")
        smallest = min(m for _, m, _ in self.sizes())
        if self.mask != DENSE and smallest < self.degree:
            raise ValueError(
                f"the smallest m is {smallest}, a column uses {self.degree} rows: raise n or the smallest delta"
            )

    @property
    def success_below(self) -> float:
        """Relative error up to which a code counts as recovered."""
        return max(0.001, 5 * self.noise) if self.tolerance is None else self.tolerance

    def sizes(self) -> list[tuple[float, int, list[int]]]:
        """``(δ, m, the distinct k)`` of the map."""
        rows = []
        for delta in steps_to(self.max_delta, self.deltas):
            m = round(delta * self.n)
            rows.append((delta, m, sorted({max(1, round(rho * m)) for rho in steps_to(self.max_rho, self.rhos)})))
        return rows


def steps_to(largest: float, count: int) -> tuple[float, ...]:
    """``count`` even steps from 0, excluded, to ``largest``."""
    return tuple(round(largest * step / count, 4) for step in range(1, count + 1))


LAPTOP = PhaseSettings()
SMOKE = PhaseSettings(n=128, degree=4, deltas=2, rhos=4, trials=4, draws=2)
PAPER = PhaseSettings(n=4096, deltas=16, rhos=30, trials=200, draws=20)


def run_phase_transition(settings: PhaseSettings, out: Path) -> Finding:
    """Draw the map; one row for each ``δ``, with the points of the map under ``points``.

    Writes ``map.csv``: every point with its Wilson interval.
    """
    # Cells are errors and know no neighbours: a map may be refined, and the tolerance changed, in the same folder.
    grid = ("max_delta", "deltas", "max_rho", "rhos", "tolerance")
    cells = Cells(out, {key: value for key, value in asdict(settings).items() if key not in grid})
    sizes = settings.sizes()
    rows: list[dict[str, Any]] = []
    with progress("Phase transition", sum(len(ks) for _, _, ks in sizes), "point") as advance:
        for delta, m, ks in sizes:
            points = []
            for k in ks:
                errors = cells.get(f"m={m}, k={k}", lambda m=m, k=k: recovery_errors(settings, m, k))
                points.append(_point(delta, m, k, errors, settings.success_below))
                advance(1, note=f"m={m} k={k} {points[-1]['rate']:.0%}")
            columns = ([point[key] for point in points] for key in ("rho", "successes", "trials"))
            fit = fit_transition(*columns)
            k50 = fit["rho50"] * m if fit["rho50"] is not None else None
            rows.append({"delta": delta, "m": m, "k50": k50} | fit | {"points": points})
    chosen = "".join(f" {name}={value}" for name, value in settings.options.items())
    notes = [
        f"{settings.trials} problems at each point over {settings.draws} draws of the dictionary; recovered: relative "
        f"error of the code at most {settings.success_below:g}. Coefficients: {settings.coefficients}, signed. 50 %: "
        "maximum-likelihood logistic in ρ at each δ.",
    ]
    files.atomic_write_bytes(out / "map.csv", _csv([point for row in rows for point in row["points"]]))
    return Finding(rows, f"Recovery by {settings.solver}{chosen}, {describe(settings)}", notes, also=("map.csv",))


def describe(settings: PhaseSettings) -> str:
    """The ensemble in words."""
    noise = f", noise {settings.noise:g}" if settings.noise else ""
    if settings.mask == DENSE:
        return f"dense Gaussian columns, n={settings.n}{noise}"
    return f"{settings.mask} masks, {settings.values} values, d={settings.degree}, n={settings.n}{noise}"


def recovery_errors(settings: PhaseSettings, m: int, k: int) -> list[float]:
    """Relative errors ``‖x̂ - x‖ / ‖x‖`` of ``settings.trials`` planted codes, rounded to 4 digits."""
    errors: list[float] = []
    run, options = solver(settings.solver), dict(settings.options)
    if "block" in options:  # a code of one feature has no blocks of four
        options["block"] = min(options["block"], k)
    for draw in range(settings.draws):
        count = settings.trials // settings.draws + (draw < settings.trials % settings.draws)
        seed = int(np.random.SeedSequence([settings.seed, m, k, draw]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        matrix, code, h = planted(settings, m, k, count, seed)
        found = run(h, matrix, k, **options).to_dense(settings.n)
        truth = code.to_dense(settings.n)
        errors += ((found - truth).norm(dim=1) / truth.norm(dim=1)).tolist()
    # A solver that ran away is no better than one that found nothing, and infinity is no JSON.
    return [float(f"{error:.4g}") if math.isfinite(error) else 1e9 for error in errors]


def planted(settings: PhaseSettings, m: int, k: int, count: int, seed: int) -> tuple[Matrix, SparseCode, Tensor]:
    """A random matrix, ``count`` codes on it, and ``h = Wx + noise``."""
    generator = torch.Generator().manual_seed(seed)
    if settings.mask == DENSE:
        matrix: Matrix = DenseDictionary.random(m, settings.n, generator=generator).core().detach()
    else:
        mask = Mask.build(settings.mask, d_in=m, d_sae=settings.n, degree=settings.degree, seed=seed)
        matrix = random_matrix(mask, settings.values, generator)
    code = random_code(settings.n, k, count, settings.coefficients, generator)
    h = matrix.decode(code)
    noise = torch.randn(h.shape, generator=generator)
    return matrix, code, h + settings.noise * h.norm(dim=1, keepdim=True) * noise / noise.norm(dim=1, keepdim=True)


def fit_transition(rhos: Sequence[float], successes: Sequence[int], trials: Sequence[int]) -> dict[str, Any]:
    """Maximum-likelihood ``b0``, ``b1`` of the logistic curve and its 10, 50 and 90 % points.

    ``beyond`` says ``"> ρ"`` or ``"< ρ"`` where every or no problem was solved: there is no curve then. A transition
    between two neighbours on the grid has no finite steepness; ``b0`` then is at its bound.
    """
    rho, s, t = (np.asarray(x, dtype=np.float64) for x in (rhos, successes, trials))
    nothing = dict.fromkeys(("b0", "b1", "rho10", "rho50", "rho90"))
    if s.sum() == t.sum():
        return nothing | {"beyond": f"> {rho.max():.3f}"}
    if not s.any():
        return nothing | {"beyond": f"< {rho.min():.3f}"}

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        b0, b1 = np.exp(theta)
        u = b0 * (1 - b1 * rho)
        # -log likelihood and its slope in log b0 and log b1.
        slope = t * expit(u) - s
        value = -(s * log_expit(u) + (t - s) * log_expit(-u)).sum()
        return float(value), np.array([(slope * u).sum(), (slope * -b0 * b1 * rho).sum()])

    middle = 1 / np.interp(0.5, (s / t)[::-1], rho[::-1]) if (np.diff(s / t) <= 0).all() else 1 / np.median(rho)
    bounds = [(math.log(0.1), math.log(_STEEPEST)), (math.log(0.1 / rho.max()), math.log(10 / rho.min()))]
    starts = [np.clip([math.log(b0), math.log(middle)], *np.transpose(bounds)) for b0 in (5.0, 30.0, 200.0)]
    fits = [minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds) for start in starts]
    b0, b1 = np.exp(min(fits, key=lambda fit: fit.fun).x)

    def at(probability: float) -> float:
        return float((1 - math.log(probability / (1 - probability)) / b0) / b1)

    points = {f"rho{percent}": at(percent / 100) for percent in (10, 50, 90)}
    return {"b0": float(b0), "b1": float(b1)} | points | {"beyond": None}


def _point(delta: float, m: int, k: int, errors: list[float], success_below: float) -> dict[str, Any]:
    successes = sum(error <= success_below for error in errors)
    low, high = wilson(successes, len(errors))
    return {
        "delta": delta,
        "rho": k / m,
        "m": m,
        "k": k,
        "trials": len(errors),
        "successes": successes,
        "rate": successes / len(errors),
        "wilson_low": round(low, 4),
        "wilson_high": round(high, 4),
        "median_error": float(np.median(errors)),
    }


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


register(
    Experiment(
        name="phase-transition",
        question="Where does a solver stop recovering planted codes, over m/n and k/m?",
        sizes={"smoke": SMOKE, "laptop": LAPTOP, "paper": PAPER},
        run=run_phase_transition,
        columns=COLUMNS,
        picture=plot_phase_transition,
    )
)
