"""``expander-sae evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expander_sae.cli.app import app
from expander_sae.cli.options import TEXT


@app.command(epilog="Example: [bold]expander-sae evaluate runs/demo/expander-d7 --windows 32 --out runs/d7.json[/bold]")
def evaluate(
    saes: Annotated[list[str], typer.Argument(help="SAE folders or Hub ids, all of one model and layer.")],
    model: Annotated[str | None, typer.Option(help="Language model; default: the one the SAE was trained on.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer; default: the one the SAE was trained on.")] = None,
    text: Annotated[str | None, TEXT] = None,
    split: Annotated[str, typer.Option(help="`heldout` (every tenth document), `train` or `all`.")] = "heldout",
    windows: Annotated[int, typer.Option(help="Held-out windows.")] = 32,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 256,
    replaced: Annotated[
        str, typer.Option(help="Positions replaced for CE: `all-but-first` or `all`.")
    ] = "all-but-first",
    out: Annotated[Path | None, typer.Option(help="Also write the rows as JSON here.")] = None,
) -> None:
    """Evaluate SAEs inside their language model: relative error, FVU, L0, dead features, CE recovered.

    CE is next-token cross-entropy with the layer's residual stream left alone (clean), set to zero, or replaced by the
    reconstruction, at every position but the first unless told otherwise. The columns "OMP" read the same dictionary by
    orthogonal matching pursuit: the difference is what the SAE's own encoder leaves on the table.
    """
    from expander_sae import files
    from expander_sae import lm as language
    from expander_sae.environment import environment
    from expander_sae.evaluation import evaluation_rows
    from expander_sae.report.table import EVALUATION_COLUMNS, print_table
    from expander_sae.sae import SAE

    loaded = {name.rstrip("/"): SAE.from_pretrained(name) for name in saes}
    origins = [sae.metadata.get("trained_on") or {} for sae in loaded.values()]
    model_name: str = model or _agreed(origins, "model", "--model")
    layer = _agreed(origins, "layer", "--layer") if layer is None else layer
    preset = language.preset_for(model_name)
    lm = language.load_model(model_name)
    source = text or (preset.text if preset else language.PILE)
    chosen = language.sample_windows(lm.tokenizer, source, split, window, windows)  # type: ignore[arg-type]
    rows = evaluation_rows(loaded, lm, list(chosen), layer, replaced=replaced)  # type: ignore[arg-type]
    print_table(rows, EVALUATION_COLUMNS)
    print(
        f"{rows[0]['tokens']:,} positions of {len(chosen)} windows ({split}); replaced: {rows[0]['replaced']}, left alone for their norm: {rows[0]['left_alone']}"
    )
    if out:
        settings = {
            "model": model_name,
            "layer": layer,
            "text": source,
            "split": split,
            "window": window,
            "windows": len(chosen),
        }
        files.atomic_write_json(out, {"settings": settings, "environment": environment(), "rows": rows})


def _agreed(origins: list[dict[str, Any]], key: str, flag: str) -> Any:
    values = {origin.get(key) for origin in origins}
    if len(values) != 1 or None in values:
        raise ValueError(f"the SAEs do not name one {key} they were trained on ({values}): give {flag}")
    return values.pop()
