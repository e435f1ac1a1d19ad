"""``phase-transition``: where a solver stops recovering planted codes, over ``δ = m/n`` and ``ρ = k/m``.

The empirical protocol of Donoho and Tanner: at every ``(δ, ρ)`` some random problems, success where the code comes
back within a tolerance, and for each ``δ`` a logistic curve ``p(ρ) = 1 / (1 + exp(-b0 (1 - b1 ρ)))`` by maximum
likelihood on the counts, whose 50 % point is ``ρ* = 1 / b1`` (THEORY C.9).
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from torch import Tensor

from expander_sae import files
from expander_sae.dictionary import DenseDictionary, ExpanderDictionary, Matrix
from expander_sae.experiments.common.cells import Cells
from expander_sae.experiments.common.record import conclude
from expander_sae.mask import CONSTRUCTIONS, Mask
from expander_sae.ops import SparseCode
from expander_sae.progress import progress
from expander_sae.pursuit import check_options, solver
from expander_sae.report.phase import plot_phase_transition
from expander_sae.report.table import Column, number

DENSE = "dense"
VALUES = ("flat", "gaussian", "binary")
COEFFICIENTS = ("gaussian", "signs")
_STEEPEST = 1000.0  # b0 of a transition sharper than the grid can tell

COLUMNS = (
    Column("δ = m/n", number("delta", ".3f")),
    Column("m", number("m", ",")),
    Column("ρ at 50 %", lambda row: row["beyond"] or number("rho50", ".3f")(row)),
    Column("k at 50 %", number("k50", ",.0f")),
    Column("ρ at 90 %", number("rho90", ".3f")),
    Column("ρ at 10 %", number("rho10", ".3f")),
)


def steps_to(largest: float, count: int) -> tuple[float, ...]:
    """``count`` even steps from 0, excluded, to ``largest``."""
    return tuple(round(largest * step / count, 4) for step in range(1, count + 1))


@dataclass(frozen=True)
class PhaseConfig:
    """The problems of a map and who solves them.

    Attributes:
        solver, options: a name of :data:`expander_sae.pursuit.SOLVERS` and its options.
        mask: a kind of :data:`expander_sae.mask.CONSTRUCTIONS`, or ``"dense"``: independent Gaussian entries, no mask.
        degree: rows a column uses.
        values: ``"flat"`` (random signs), ``"gaussian"`` or ``"binary"`` (all equal); columns have unit norm.
        coefficients: of the planted code, ``"gaussian"`` or ``"signs"`` (±1).
        n: columns; ``m`` and ``k`` follow from ``deltas`` and ``rhos``.
        trials: problems a cell, over ``draws`` masks and values.
        noise: norm of the noise as a fraction of the signal's.
        tolerance: relative error ``‖x̂ - x‖ / ‖x‖`` up to which a code counts as recovered; ``None`` for
            ``max(.001, 5 · noise)``. Small coefficients make it matter: OMP at m=512, n=4096, d=7 recovers half of the
            Gaussian codes up to k=142 at .01, 116 at .001 and 110 at .0001; of codes of signs up to 52 at any.
        seed: every cell draws from it and its own ``m`` and ``k``, whatever else is on the grid.
    """

    solver: str = "omp"
    options: dict[str, Any] = field(default_factory=dict)
    mask: str = "left-regular"
    degree: int = 7
    values: str = "flat"
    coefficients: str = "gaussian"
    n: int = 1024
    deltas: tuple[float, ...] = steps_to(0.5, 10)
    rhos: tuple[float, ...] = steps_to(0.6, 20)
    trials: int = 48
    draws: int = 4
    noise: float = 0.0
    tolerance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self.solver, self.options)
        for name, value, known in (
            ("mask", self.mask, (*CONSTRUCTIONS, DENSE)),
            ("values", self.values, VALUES),
            ("coefficients", self.coefficients, COEFFICIENTS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        for name, grid in (("deltas", self.deltas), ("rhos", self.rhos)):
            if not grid or not all(0 < x <= 1 for x in grid):
                raise ValueError(f"{name} must lie in (0, 1], got {list(grid)}")
        if not 1 <= self.draws <= self.trials:
            raise ValueError(f"draws must be between 1 and trials = {self.trials}, got {self.draws}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must not be negative, got {self.noise}")
        smallest = min(round(delta * self.n) for delta in self.deltas)
        if self.mask != DENSE and smallest < self.degree:
            raise ValueError(
                f"the smallest m is {smallest}, a column uses {self.degree} rows: raise n or the smallest delta"
            )

    @property
    def success_below(self) -> float:
        return max(0.001, 5 * self.noise) if self.tolerance is None else self.tolerance

    def sizes(self) -> list[tuple[float, int, list[int]]]:
        """``(δ, m, the distinct k)`` of the map."""
        rows = []
        for delta in self.deltas:
            m = round(delta * self.n)
            rows.append((delta, m, sorted({max(1, round(rho * m)) for rho in self.rhos})))
        return rows


def quick(config: PhaseConfig) -> PhaseConfig:
    """The same in a coarse map of small problems: a first look."""
    rhos = config.rhos[1 :: max(1, len(config.rhos) // 8)]
    return replace(config, n=min(config.n, 512), deltas=config.deltas[1::3], rhos=rhos, trials=12, draws=2)


def run_phase_transition(out: str | Path, config: PhaseConfig) -> list[dict[str, Any]]:
    """Draw the map; interrupted and started again, it continues. Returns the transitions, one row a ``δ``.

    Writes ``map.csv`` (every cell with its Wilson interval), ``map.png``, and the transitions as ``results.json`` and
    ``results.md`` into ``out``.
    """
    out = Path(out)
    # Cells are errors and know no neighbours: a grid may be refined, and the tolerance changed, in the same folder.
    cells = Cells(
        out, {key: value for key, value in asdict(config).items() if key not in ("deltas", "rhos", "tolerance")}
    )
    sizes = config.sizes()
    print(f"{config.solver} on {describe(config)}; results in {out}", file=sys.stderr)
    grid: list[dict[str, Any]] = []
    with progress("Phase transition", sum(len(ks) for _, _, ks in sizes), "cell") as advance:
        for delta, m, ks in sizes:
            for k in ks:
                errors = cells.get(f"m={m}, k={k}", lambda m=m, k=k: recovery_errors(config, m, k))
                grid.append(_cell(delta, m, k, errors, config.success_below))
                advance(1, note=f"m={m} k={k} {grid[-1]['rate']:.0%}")
    transitions = []
    for delta, m, _ in sizes:
        row = [cell for cell in grid if cell["m"] == m]
        fit = fit_transition([c["rho"] for c in row], [c["successes"] for c in row], [c["trials"] for c in row])
        k50 = fit["rho50"] * m if fit["rho50"] is not None else None
        transitions.append({"delta": delta, "m": m, "k50": k50} | fit)
    chosen = "".join(f" {name}={value}" for name, value in config.options.items())
    title = f"Recovery by {config.solver}{chosen}, {describe(config)}"
    notes = [
        f"{config.trials} problems a cell over {config.draws} draws of the dictionary; recovered: relative error of "
        f"the code at most {config.success_below:g}. Coefficients: {config.coefficients}. 50 %: maximum-likelihood "
        "logistic in ρ at each δ.",
    ]
    files.atomic_write_bytes(out / "map.csv", _csv(grid))
    plot = partial(plot_phase_transition, grid)
    conclude(out, transitions, COLUMNS, asdict(config), title, notes, "map.png", plot, also=("map.csv",))
    return transitions


def describe(config: PhaseConfig) -> str:
    """The ensemble in words."""
    noise = f", noise {config.noise:g}" if config.noise else ""
    if config.mask == DENSE:
        return f"dense Gaussian columns, n={config.n}{noise}"
    return f"{config.mask} masks, {config.values} values, d={config.degree}, n={config.n}{noise}"


def recovery_errors(config: PhaseConfig, m: int, k: int) -> list[float]:
    """Relative errors ``‖x̂ - x‖ / ‖x‖`` of ``config.trials`` planted codes, rounded to 4 digits."""
    errors: list[float] = []
    run, options = solver(config.solver), dict(config.options)
    if "block" in options:  # a code of one feature has no blocks of four
        options["block"] = min(options["block"], k)
    for draw in range(config.draws):
        count = config.trials // config.draws + (draw < config.trials % config.draws)
        seed = int(np.random.SeedSequence([config.seed, m, k, draw]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        matrix, code, h = planted(config, m, k, count, seed)
        found = run(h, matrix, k, **options).to_dense(config.n)
        truth = code.to_dense(config.n)
        errors += ((found - truth).norm(dim=1) / truth.norm(dim=1)).tolist()
    # A solver that ran away is no better than one that found nothing, and infinity is no JSON.
    return [float(f"{error:.4g}") if math.isfinite(error) else 1e9 for error in errors]


def planted(config: PhaseConfig, m: int, k: int, count: int, seed: int) -> tuple[Matrix, SparseCode, Tensor]:
    """A random matrix, ``count`` codes on it, and ``h = Wx + noise``."""
    generator = torch.Generator().manual_seed(seed)
    if config.mask == DENSE:
        matrix: Matrix = DenseDictionary.random(m, config.n, generator=generator).matrix().detach()
    else:
        mask = Mask.build(config.mask, d_in=m, d_sae=config.n, degree=config.degree, seed=seed)
        values = torch.randn(mask.rows.shape, generator=generator)
        values = {"flat": values.sign(), "gaussian": values, "binary": torch.ones_like(values)}[config.values]
        matrix = ExpanderDictionary(mask, values).matrix().detach()
    features = torch.rand(count, config.n, generator=generator).topk(k, dim=1).indices.to(torch.int32)
    amounts = torch.randn(count, k, generator=generator)
    code = SparseCode(features, amounts.sign() if config.coefficients == "signs" else amounts)
    h = matrix.decode(code)
    noise = torch.randn(h.shape, generator=generator)
    return matrix, code, h + config.noise * h.norm(dim=1, keepdim=True) * noise / noise.norm(dim=1, keepdim=True)


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927); ``z = 1.96`` for 95 %."""
    centre = (successes + z * z / 2) / (trials + z * z)
    half = z * math.sqrt(successes * (trials - successes) / trials + z * z / 4) / (trials + z * z)
    return max(0.0, centre - half), min(1.0, centre + half)


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


def _cell(delta: float, m: int, k: int, errors: list[float], success_below: float) -> dict[str, Any]:
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
