"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum

import typer

SEED = typer.Option(help="Seed of mask, initial values and batch order.")
LAYER = typer.Option(help="Block whose output is read, counted from 0. Default: the layer studied on a known model.")
MODEL = typer.Option(
    help="A Hub id, a local folder, a short name (pythia-70m, pythia-160m, qwen2.5-3b, llama-3.2-1b), or `embedded`."
)
TEXT = typer.Option(
    help="`embedded`, a .txt or .jsonl file, a folder of these, or a `datasets` id (streamed). Default: the model's."
)
SCALE = typer.Option(
    help="`smoke`: does it run? Seconds of computing. `laptop`: two cores, the embedded model. `paper`: its sizes and model, for a GPU with the Hub."
)


class Scale(StrEnum):
    """How much an experiment does."""

    smoke = "smoke"
    laptop = "laptop"
    paper = "paper"


class DemoScale(StrEnum):
    """How much the demo does."""

    smoke = "smoke"
    laptop = "laptop"
