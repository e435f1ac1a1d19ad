"""``expander-sae harvest``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expander_sae.cli import options
from expander_sae.cli.app import app


@app.command(
    epilog="Examples:\n\n[bold]expander-sae harvest --model EleutherAI/pythia-70m-deduped --layer 3 --tokens 1000000 --out acts/pythia[/bold]\n\n"
    "[bold]expander-sae harvest --layer 5 --layer 15 --hook residual --hook mlp --out acts/smollm2[/bold]"
)
def harvest(
    out: Annotated[Path, typer.Option(help="Folder of the activation store; of several, in folders as mlp-15.")],
    model: Annotated[str, options.MODEL] = "embedded",
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Block, counted from 0; repeatable. Default: the layer studied on a known model."),
    ] = None,
    hook: Annotated[
        list[str] | None,
        typer.Option(help="`residual` (the block's output, default), `attention`, `mlp`; repeatable."),
    ] = None,
    text: Annotated[str | None, options.TEXT] = None,
    text_field: Annotated[str, options.TEXT_FIELD] = "text",
    split: Annotated[str, typer.Option(help="`train`, `heldout` (every tenth document) or `all`.")] = "train",
    tokens: Annotated[int, typer.Option(help="Activation vectors to store.")] = 400_000,
    window: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    bos: Annotated[bool | None, options.BOS] = None,
    concatenate: Annotated[
        bool,
        typer.Option(
            "--concatenate/--one-document",
            help="Documents end to end with EOS between them, or one for each window: its beginning.",
        ),
    ] = True,
    skip_special: Annotated[
        bool, typer.Option("--skip-special", help="Leave out the positions of all special tokens.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Of the store: float32, bfloat16, float16; auto is the model's own.")
    ] = "auto",
    batch_windows: Annotated[int | None, typer.Option(help="Windows a forward pass; default fits the device.")] = None,
    max_norm_multiple: Annotated[
        float, typer.Option(help="Leave out positions whose norm exceeds this multiple of the median; inf: none.")
    ] = 10.0,
    revision: Annotated[str | None, options.REVISION] = None,
    model_dtype: Annotated[str, options.MODEL_DTYPE] = "auto",
    device: Annotated[str | None, options.DEVICE] = None,
    device_map: Annotated[str | None, options.DEVICE_MAP] = None,
    quantize: Annotated[str | None, options.QUANTIZE] = None,
    tokenizer: Annotated[str | None, options.TOKENIZER] = None,
    trust_remote_code: Annotated[bool, options.TRUST] = False,
) -> None:
    """Run a language model over text and store its activations at one place in it, or several in one pass.

    Position 0 of every window and positions with outlying norms (attention sinks) are left out and counted. The
    size on disk is printed and checked first. A killed harvest continues with the same command.
    """
    from expander_sae import lm as language

    preset = language.preset_for(model)
    layers = _layers(layer, preset)
    how_loaded: dict[str, Any] = {
        "dtype": model_dtype, "device": device, "revision": revision, "tokenizer": tokenizer,
        "device_map": device_map, "quantize": quantize, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    loaded = language.load_model(model, **how_loaded)
    source = text or (preset.text if preset else language.PILE)
    chosen: Any = {
        "split": split, "text_field": text_field, "window": window, "batch_windows": batch_windows, "dtype": dtype,
        "bos": bos, "concatenate": concatenate, "skip_special": skip_special, **options.multiple(max_norm_multiple),
    }  # fmt: skip
    hooks: Any = hook or ["residual"]
    if len(layers) == len(hooks) == 1:
        stores = {"": language.harvest(loaded, source, layers[0], tokens, out, hook=hooks[0], **chosen)}
    else:
        stores = language.harvest_many(loaded, source, layers, tokens, out, hooks=hooks, **chosen)
    for store in stores.values():
        manifest = store.manifest
        counts = manifest.cursor or {}
        also = [f"{counts[key]:,} {what}" for key, what in _COUNTS.items() if counts.get(key)]
        print(
            f"{store.folder}: {len(store):,} x {store.d_in}, left out {manifest.left_out_by_position:,} by position and "
            f"{manifest.left_out_by_norm:,} by norm" + "".join(f", {what}" for what in also)
        )


_COUNTS = {"left_out_special": "special tokens", "documents_too_short": "documents shorter than a window"}


def _layers(layers: list[int] | None, preset: Any) -> list[int]:
    if layers:
        return layers
    if preset is None:
        raise ValueError("this model has no studied layer: say which with --layer")
    return [preset.layers[0]]
