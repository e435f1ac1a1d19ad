"""``expander-sae evaluate``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from expander_sae.cli import options
from expander_sae.cli.app import app


@app.command(epilog="Example: [bold]expander-sae evaluate runs/demo/expander-d7 --windows 32 --out runs/d7.json[/bold]")
def evaluate(
    saes: Annotated[list[str], typer.Argument(help="SAE folders or Hub ids, all of one model and layer.")],
    model: Annotated[str | None, typer.Option(help="Language model; default: the one the SAE was trained on.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer; default: the one the SAE was trained on.")] = None,
    hook: Annotated[
        str | None, typer.Option(help="`residual`, `attention` or `mlp`; default: the one the SAE was trained on.")
    ] = None,
    text: Annotated[str | None, options.TEXT] = None,
    text_field: Annotated[str, options.TEXT_FIELD] = "text",
    split: Annotated[str, typer.Option(help="`heldout` (every tenth document), `train` or `all`.")] = "heldout",
    windows: Annotated[int | None, typer.Option(help="Held-out windows. Default: the convention's.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens a window. Default: the convention's.")] = None,
    bos: Annotated[bool | None, options.BOS] = None,
    convention: Annotated[
        str, typer.Option(help="How CE recovered is measured: `ours`, `paper` or `saelens`, see below.")
    ] = "ours",
    replaced: Annotated[
        str | None, typer.Option(help="Positions replaced for CE: `all-but-first` or `all`. Default: the convention's.")
    ] = None,
    max_norm_multiple: Annotated[
        float | None,
        typer.Option(help="Leave alone positions whose norm exceeds this multiple of the median; inf: none. "
                     "Default: as the SAE's data were chosen."),
    ] = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Evaluate in another model or place than the SAE was trained on.")
    ] = False,
    revision: Annotated[str | None, options.REVISION] = None,
    model_dtype: Annotated[str, options.MODEL_DTYPE] = "auto",
    device: Annotated[str | None, options.DEVICE] = None,
    device_map: Annotated[str | None, options.DEVICE_MAP] = None,
    quantize: Annotated[str | None, options.QUANTIZE] = None,
    tokenizer: Annotated[str | None, options.TOKENIZER] = None,
    trust_remote_code: Annotated[bool, options.TRUST] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the rows as JSON here.")] = None,
) -> None:  # fmt: skip
    """Evaluate SAEs inside their language model: relative error, FVU, L0, dead features, CE recovered.

    CE is next-token cross-entropy with the activations at the SAE's place left alone (clean), set to zero, or replaced
    by the reconstruction. The columns "OMP" read the same dictionary by orthogonal matching pursuit: the difference is
    what the SAE's own encoder leaves on the table.

    Conventions: `ours` replaces every position but the first of a window and those the training data left out (norms,
    special tokens); `paper` every position of the beginnings of 100 documents of at least 128 tokens, as the paper's
    author; `saelens` windows of 128 that begin with BOS, every position but special tokens, as `sae_lens.evals`.
    """
    from expander_sae import files
    from expander_sae import lm as language
    from expander_sae.environment import environment
    from expander_sae.evaluation import convention_named, differences, evaluation_rows
    from expander_sae.report.table import EVALUATION_COLUMNS, print_table
    from expander_sae.training import load_sae

    how = convention_named(convention).with_replaced(replaced)  # type: ignore[arg-type]
    loaded = {name.rstrip("/"): load_sae(name) for name in saes}
    origins = [sae.metadata.get("trained_on") or {} for sae in loaded.values()]
    model_name: str = model or _agreed(origins, "model", "--model")
    at: int = _agreed(origins, "layer", "--layer") if layer is None else layer
    preset = language.preset_for(model_name)
    how_loaded: dict[str, Any] = {
        "dtype": model_dtype, "device": device, "revision": revision or _recorded_revision(origins, model_name),
        "tokenizer": tokenizer, "device_map": device_map, "quantize": quantize, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    lm = language.load_model(model_name, **how_loaded)
    place: Any = hook
    if allow_mismatch:
        for line in differences(loaded, lm, at, place):
            print(f"Not as trained: {line}", file=sys.stderr)
    source = text or (preset.text if preset else language.PILE)
    length = lm.check_window(window or how.window)
    packing = _packing(origins, how, bos, lm)
    part: Any = split
    chosen = language.sample_windows(
        lm.tokenizer, source, part, length, windows or how.windows, spread=how.spread, text_field=text_field, **packing
    )
    there = {name: sae.to(lm.device) for name, sae in loaded.items()}
    rows = evaluation_rows(
        there, lm, list(chosen), at, hook=place, convention=how, allow_mismatch=allow_mismatch,
        **options.multiple(max_norm_multiple),
    )  # fmt: skip
    print_table(rows, EVALUATION_COLUMNS)
    first = rows[0]
    limit = "no limit" if first["norm_limit"] is None else f"limit {first['norm_limit']:.3g}"
    print(
        f"{first['tokens']:,} positions of {len(chosen)} windows ({split}); replaced: {first['replaced']}, left alone: "
        f"{first['left_alone']} ({limit}, {first['norm_limit_source']})\n"
        f"Convention {first['convention']}: {how.summary}. Windows of {length} tokens"
        f"{', each beginning with BOS' if packing['bos'] else ''}"
        f"{'' if packing['concatenate'] else ', one document each'}."
    )
    signed = [row["name"] for row in rows if row["signed"]]
    print(f"Codes may be negative (signed): {', '.join(signed) or 'none'}; those of OMP always.")
    if out:
        settings = {
            "model": model_name,
            "revision": lm.revision,
            "layer": at,
            "text": source,
            "split": split,
            "window": length,
            "windows": len(chosen),
            "convention": how.name,
            **packing,
        }
        files.atomic_write_json(
            files.user_path(out), {"settings": settings, "environment": environment(), "rows": rows}
        )


def _agreed(origins: list[dict[str, Any]], key: str, flag: str) -> Any:
    values = {origin.get(key) for origin in origins}
    if len(values) != 1 or None in values:
        raise ValueError(f"the SAEs do not name one {key} they were trained on ({values}): give {flag}")
    return values.pop()


def _recorded_revision(origins: list[dict[str, Any]], model: str) -> str | None:
    """The commit that the SAEs record of this Hub model; None if they record none, or several."""
    from expander_sae.lm import is_commit, preset_for

    preset = preset_for(model)
    names = {model, preset.hub_id if preset else model}
    found = {origin.get("revision") for origin in origins if origin.get("model") in names}
    return next(iter(found)) if len(found) == 1 and is_commit(next(iter(found))) else None


def _packing(origins: list[dict[str, Any]], how: Any, bos: bool | None, lm: Any) -> dict[str, Any]:
    """How documents become windows: as told, else as the convention says, else as the training data were made."""
    from expander_sae.lm import wants_bos

    recorded: Mapping[str, Any] = next((origin for origin in origins if origin), {})
    if bos is None:
        asked = how.bos if how.bos is not None else recorded.get("bos", False if recorded else wants_bos(lm))
        bos = asked and getattr(lm.tokenizer, "bos_token_id", None) is not None
    concatenate = how.concatenate if how.concatenate is not None else recorded.get("concatenate", True)
    return {"bos": bool(bos), "concatenate": bool(concatenate), "separator": how.separator}
