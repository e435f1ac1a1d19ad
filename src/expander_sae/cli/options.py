"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import typer

SEED = typer.Option(help="Seed of mask, initial values and batch order.")
MODEL = typer.Option(
    help="A Hub id, a local folder, a short name (pythia-70m, pythia-160m, qwen2.5-3b, llama-3.2-1b), or `embedded`."
)
TEXT = typer.Option(
    help="`embedded`, a .txt, .jsonl, .json, .csv or .parquet file (or .gz), a folder of these, or a `datasets` id "
    "(streamed). Default: the model's."
)
TEXT_FIELD = typer.Option(help="The field of a record that holds the text.")
BOS = typer.Option(
    "--bos/--no-bos",
    help="Begin every window with BOS. Default: as the SAE's data, else where the tokenizer does, and for Gemma.",
)
REVISION = typer.Option(help="Branch, tag or commit of a Hub model. Default: the SAE's own, else main.")
MODEL_DTYPE = typer.Option(help="Of the model: float32, bfloat16, float16; auto is the faster one here.")
DEVICE = typer.Option(help="cpu or cuda; default: cuda if there is one.")
TOKENIZER = typer.Option(help="Take the tokenizer from this Hub id or folder.")
DEVICE_MAP = typer.Option(help="Spread a large model over devices as `accelerate` does: auto, balanced, …")
QUANTIZE = typer.Option(help="Run the model in 8bit or 4bit (bitsandbytes, CUDA).")
TRUST = typer.Option("--trust-remote-code", help="Run code that comes with the model.")


def multiple(value: float | None) -> dict[str, Any]:
    """``--max-norm-multiple`` as a keyword argument: infinity is no limit, nothing given leaves the default."""
    return {} if value is None else {"max_norm_multiple": None if value == float("inf") else value}


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
