"""``expander-sae train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expander_sae.cli.app import app
from expander_sae.cli.options import SEED


@app.command(
    epilog="Examples:\n\n[bold]expander-sae train --store acts/pythia --d-sae 4096 --degree 7 --k 64 --preset paper --out runs/d7[/bold]\n\n"
    "[bold]expander-sae train --store acts/pythia --config runs/d7/recipe.yaml --set lr=1e-3 --out runs/d7-lr[/bold]"
)
def train(
    store: Annotated[Path, typer.Option(help="Activation store to train on.")],
    out: Annotated[Path, typer.Option(help="Folder for the SAE, its log and checkpoints.")],
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file of settings; flags override it.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="`paper` (the paper's recipe), `modern` (default) or `pursuit`.")
    ] = None,
    dictionary: Annotated[str | None, typer.Option(help="`expander` or `dense`.")] = None,
    d_sae: Annotated[int | None, typer.Option(help="Features; default: the number studied on a known model.")] = None,
    degree: Annotated[int | None, typer.Option(help="Rows each column of an expander uses.")] = None,
    k: Annotated[int | None, typer.Option(help="Active features a sample; default likewise.")] = None,
    encoder: Annotated[str | None, typer.Option(help="`tied`, `untied`, or a pursuit such as `omp`.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Activation vectors a step.")] = None,
    seed: Annotated[int | None, SEED] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as name=value; repeatable.")
    ] = None,
    track: Annotated[list[str] | None, typer.Option(help="Also log to `tensorboard` or `wandb`; repeatable.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard the checkpoint in the out folder.")] = False,
) -> None:
    """Train an SAE on an activation store.

    Settings come from the preset, then the config file, then the flags; the effective ones are saved as recipe.yaml
    beside the result. Every setting of `--set` is a field of SAEConfig or TrainConfig, documented there. An
    interrupted run continues with the same command and ends with the same weights, bit for bit.
    """
    import torch
    import yaml

    from expander_sae import files
    from expander_sae.data import ActivationStore
    from expander_sae.lm import preset_for
    from expander_sae.training import recipe
    from expander_sae.training.trainer import TrainingDiverged
    from expander_sae.training.trainer import train as run

    flags = {"preset": preset, "dictionary": dictionary, "d_sae": d_sae, "degree": degree, "k": k, "encoder": encoder}
    flags |= {"steps": steps, "batch_size": batch_size, "seed": seed}
    given = {name: value for name, value in flags.items() if value is not None}
    source = ActivationStore.open(store)
    studied = preset_for(source.manifest.meta.model)
    usual = {"d_sae": studied.d_sae, "k": studied.k} if studied else {}
    read = recipe.read_config(config) if config else {}
    settings = recipe.resolve(usual, read, given, recipe.parse_settings(set_ or []))
    sae = settings.sae.build(source.d_in).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sae.metadata["trained_on"] = source.origin()
    effective = yaml.safe_dump(settings.to_dict(), sort_keys=False).encode()
    try:
        summary = run(sae, source, settings.train, out, restart=restart, trackers=tuple(track or ()))
    except (KeyboardInterrupt, TrainingDiverged):
        files.atomic_write_bytes(out / "recipe.yaml", effective)
        raise
    # Not before: settings that the checkpoint in the folder refuses must not replace those it was made with.
    files.atomic_write_bytes(out / "recipe.yaml", effective)
    print(
        f"{out}: {sae.num_values:,} values, {files.human_bytes(sae.num_bytes)}, trained in {summary['seconds']:.1f} s"
    )
