"""``expander-sae harvest``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expander_sae.cli.app import app
from expander_sae.cli.options import LAYER, MODEL, TEXT


@app.command(
    epilog="Example: [bold]expander-sae harvest --model EleutherAI/pythia-70m --layer 3 --tokens 1000000 --out acts/pythia[/bold]"
)
def harvest(
    out: Annotated[Path, typer.Option(help="Folder of the activation store.")],
    model: Annotated[str, MODEL] = "embedded",
    layer: Annotated[int | None, LAYER] = None,
    text: Annotated[str | None, TEXT] = None,
    split: Annotated[str, typer.Option(help="`train`, `heldout` (every tenth document) or `all`.")] = "train",
    tokens: Annotated[int, typer.Option(help="Activation vectors to store.")] = 400_000,
    window: Annotated[int, typer.Option(help="Tokens a sequence; documents are packed with EOS between them.")] = 256,
    dtype: Annotated[
        str, typer.Option(help="Of the store: float32, bfloat16, float16; auto is the model's own.")
    ] = "auto",
    model_dtype: Annotated[
        str, typer.Option(help="Of the model: float32, bfloat16, float16; auto is the faster one here.")
    ] = "auto",
    batch_windows: Annotated[int | None, typer.Option(help="Windows a forward pass; default fits the device.")] = None,
    max_norm_multiple: Annotated[
        float, typer.Option(help="Leave out positions whose norm exceeds this multiple of the median.")
    ] = 10.0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
) -> None:
    """Run a language model over text and store its residual stream at one layer.

    Position 0 of every window and positions with outlying norms (attention sinks) are left out and counted. The
    size on disk is printed and checked first. A killed harvest continues with the same command.
    """
    from expander_sae import lm as language

    preset = language.preset_for(model)
    loaded = language.load_model(model, dtype=model_dtype, revision=revision)  # type: ignore[arg-type]
    store = language.harvest(
        loaded,
        text or (preset.text if preset else language.PILE),
        _layer(layer, preset),
        tokens,
        out,
        split=split,  # type: ignore[arg-type]
        window=window,
        batch_windows=batch_windows,
        dtype=dtype,
        max_norm_multiple=max_norm_multiple,
    )
    manifest = store.manifest
    print(
        f"{out}: {len(store):,} x {store.d_in}, left out {manifest.left_out_by_position:,} by position and "
        f"{manifest.left_out_by_norm:,} by norm"
    )


def _layer(layer: int | None, preset: Any) -> int:
    if layer is not None:
        return layer
    if preset is None:
        raise ValueError("this model has no studied layer: say which with --layer")
    return preset.layers[0]
