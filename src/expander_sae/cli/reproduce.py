"""``expander-sae reproduce`` and ``phase-transition``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from expander_sae.cli.app import app

reproduce = typer.Typer(
    name="reproduce",
    help="The experiments of the paper and beyond it, on the embedded model. Interrupted, the same command continues.",
    no_args_is_help=True,
)
app.add_typer(reproduce, epilog="Example: [bold]expander-sae reproduce omp --quick[/bold]")

_OUT = typer.Option(help="Folder for the tables, the picture and what is needed to continue.")
_QUICK = typer.Option("--quick", help="A small version: minutes.")
_SEEDS = typer.Option(min=1, help="Runs of everything; more can be added to a finished folder. Default 3, quick 1.")


@reproduce.command("omp", epilog="Example: [bold]expander-sae reproduce omp --quick --out runs/omp[/bold]")
def reproduce_omp(
    out: Annotated[Path, _OUT] = Path("runs/omp"),
    quick: Annotated[bool, _QUICK] = False,
    seeds: Annotated[int | None, _SEEDS] = None,
) -> None:
    """Trained expander and dense dictionaries read by every solver: relative error over seeds, time a sample."""
    from expander_sae.experiments import pursuits

    size = pursuits.QUICK if quick else pursuits.FULL
    pursuits.run_pursuits(out, replace(size, seeds=tuple(range(seeds))) if seeds else size)


@reproduce.command("amortisation", epilog="Example: [bold]expander-sae reproduce amortisation --quick[/bold]")
def reproduce_amortisation(
    out: Annotated[Path, _OUT] = Path("runs/amortisation"),
    quick: Annotated[bool, _QUICK] = False,
    seeds: Annotated[int | None, _SEEDS] = None,
    dense_pursuit: Annotated[
        bool | None,
        typer.Option(
            help="Also train the full-width dense SAE by pursuit: longer than all others. Default yes, quick no."
        ),
    ] = None,
) -> None:
    """What the own encoder leaves on the table against OMP: expander, dense and matched-width dense SAEs."""
    from expander_sae.experiments import amortisation

    size = amortisation.QUICK if quick else amortisation.FULL
    size = size if dense_pursuit is None else replace(size, dense_pursuit=dense_pursuit)
    amortisation.run_amortisation(out, replace(size, seeds=tuple(range(seeds))) if seeds else size)


@reproduce.command("block-size", epilog="Example: [bold]expander-sae reproduce block-size --device cuda[/bold]")
def reproduce_block_size(
    out: Annotated[Path, _OUT] = Path("runs/block-size"),
    quick: Annotated[bool, _QUICK] = False,
    device: Annotated[list[str] | None, typer.Option(help="cpu, cuda; repeatable. Default: all there are.")] = None,
) -> None:
    """OMP with L columns a round (the paper's Table 5): time, speed-up, relative error, plain and row-disjoint."""
    from expander_sae.experiments import block_size

    block_size.run_block_size(out, block_size.QUICK if quick else block_size.FULL, tuple(device or ()))


@reproduce.command("dictionary-update", epilog="Example: [bold]expander-sae reproduce dictionary-update --quick[/bold]")
def reproduce_dictionary_update(
    out: Annotated[Path, _OUT] = Path("runs/dictionary-update"),
    quick: Annotated[bool, _QUICK] = False,
) -> None:
    """Adam against exact least-squares updates of the dictionary: FVU over seconds, from the same start."""
    from expander_sae.experiments import exact_update

    exact_update.run_dictionary_update(out, exact_update.QUICK if quick else exact_update.FULL)


@app.command(
    epilog="Example: [bold]expander-sae phase-transition --solver omp --set block=4 --quick --out runs/map[/bold]"
)
def phase_transition(
    out: Annotated[Path, typer.Option(help="Folder for map.csv, map.png and the fitted transitions.")],
    solver: Annotated[str, typer.Option(help="A pursuit, such as `omp`, `matching-pursuit`, `parallel-l0`.")] = "omp",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the solver, name=value; repeatable.")
    ] = None,
    mask: Annotated[str, typer.Option(help="Kind of mask, as `left-regular`; `dense` is none.")] = "left-regular",
    degree: Annotated[int, typer.Option(help="Rows a column uses.")] = 7,
    values: Annotated[str, typer.Option(help="`flat` (random signs), `gaussian` or `binary` (all equal).")] = "flat",
    coefficients: Annotated[str, typer.Option(help="Of the planted code: `gaussian` or `signs`.")] = "gaussian",
    n: Annotated[int, typer.Option(help="Columns.")] = 1024,
    trials: Annotated[int, typer.Option(help="Problems a cell.")] = 48,
    noise: Annotated[float, typer.Option(help="Norm of the noise as a fraction of the signal's.")] = 0.0,
    tolerance: Annotated[float | None, typer.Option(help="Relative error of a recovered code; default .001.")] = None,
    max_delta: Annotated[float, typer.Option(help="Largest m / n of the map.")] = 0.5,
    max_rho: Annotated[float, typer.Option(help="Largest k / m of the map.")] = 0.6,
    seed: Annotated[int, typer.Option(help="Seed of masks, values, codes and noise.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A coarse map of smaller problems.")] = False,
) -> None:
    """Where a solver stops recovering sparse codes: success over m/n and k/m, with the fitted 50 % line.

    Interrupted, the same command continues.
    """
    from expander_sae.experiments import phase_transition as experiment
    from expander_sae.training.recipe import parse_settings

    config = experiment.PhaseConfig(
        solver=solver, options=parse_settings(set_ or []), mask=mask, degree=degree, values=values,
        coefficients=coefficients, n=n, deltas=experiment.steps_to(max_delta, 10),
        rhos=experiment.steps_to(max_rho, 20), trials=trials, noise=noise, tolerance=tolerance,
        seed=seed,
    )  # fmt: skip
    experiment.run_phase_transition(out, experiment.quick(config) if quick else config)
