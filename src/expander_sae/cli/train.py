"""``expander-sae train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expander_sae.cli.app import app
from expander_sae.cli.options import DEVICE, SEED

if TYPE_CHECKING:
    import torch

    from expander_sae.data import ActivationStore
    from expander_sae.sae import SAE
    from expander_sae.training.recipe import Recipe

# Written out, because `--help` need not wait for torch; a test compares them with the registries.
PRESET_CHOICES = (
    "`paper`, `modern` (default), `pursuit`, `pursuit-nonneg`, `paper-stable`, `multi-topk`, `batch-topk`, `relu-l1`, "
    "`jumprelu`, `gated`"
)
ENCODERS = (
    "`tied`, `untied`, or a pursuit: `omp`, `ols`, `matching-pursuit`, `mp-unrolled`, `gradient-pursuit`, `iht`, `niht`, "
    "`htp`, `cosamp`, `subspace-pursuit`, `ista`, `fista`, `parallel-l0`, `serial-l0`, `robust-l0`, `smp`, `ssmp`, "
    "`expander-recovery`, `lddsr`"
)


def _print_settings(asked: bool) -> None:
    if asked:
        from expander_sae.training.recipe import PRESET_NOTES, settings_reference

        print("Presets (--preset):")
        for name, note in PRESET_NOTES.items():
            print(f"  {name:<16} {note}")
        print("\nSettings (--set name=value, or in a config file):")
        for setting in settings_reference():
            choices = f"; one of {', '.join(setting.choices)}" if setting.choices else ""
            print(f"\n  {setting.name} = {setting.default} ({setting.type}{choices})")
            print(f"      {setting.text.replace('``', '`')}")
        raise typer.Exit


@app.command(
    epilog="Examples:\n\n[bold]expander-sae train --store acts/pythia --d-sae 4096 --degree 7 --k 64 --preset paper --out runs/d7[/bold]\n\n"
    "[bold]expander-sae train --store acts/pythia --config runs/d7/recipe.yaml --set lr=1e-3 --out runs/d7-lr[/bold]\n\n"
    "[bold]expander-sae train --store acts/pythia --from runs/d7 --steps 2000 --out runs/d7-further[/bold]"
)
def train(
    store: Annotated[Path, typer.Option(help="Activation store to train on.")],
    out: Annotated[Path, typer.Option(help="Folder for the SAE, its log and checkpoints.")],
    from_: Annotated[
        str | None,
        typer.Option("--from", help="Train this SAE further: a folder, a Hub id, a checkpoint or an unfinished run."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file of settings; flags override it.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"One of {PRESET_CHOICES}; see --settings.")] = None,
    dictionary: Annotated[str | None, typer.Option(help="`expander` or `dense`.")] = None,
    d_sae: Annotated[int | None, typer.Option(help="Features; default: the number studied on a known model.")] = None,
    degree: Annotated[int | None, typer.Option(help="Rows each column of an expander uses.")] = None,
    k: Annotated[int | None, typer.Option(help="Active features per sample; default likewise.")] = None,
    encoder: Annotated[str | None, typer.Option(help=ENCODERS + ".")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps. More than a finished run in `out` has done make it longer.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Activation vectors per step.")] = None,
    seed: Annotated[int | None, SEED] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as name=value; repeatable. See --settings.")
    ] = None,
    settings: Annotated[
        bool, typer.Option("--settings", is_eager=True, callback=_print_settings, help="List all settings and exit.")
    ] = False,
    track: Annotated[list[str] | None, typer.Option(help="Also log to `tensorboard` or `wandb`; repeatable.")] = None,
    track_project: Annotated[str | None, typer.Option(help="W&B project; default expander-sae.")] = None,
    track_name: Annotated[str | None, typer.Option(help="Name of the W&B run; default the out folder's.")] = None,
    device: Annotated[str | None, DEVICE] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard the checkpoint in the out folder, replace an SAE there.")
    ] = False,
) -> None:
    """Train an SAE on an activation store.

    Settings come from the preset, then the config file, then the flags; the effective ones are saved as recipe.yaml
    beside the result. An interrupted run continues with the same command and ends with the same weights, bit for bit;
    one that is finished goes on if more --steps are asked for, from there with the learning rates of the longer
    schedule.

    With --from another SAE is trained further: its weights, a new optimiser and schedule. After a divergence that is
    how to go on from the last checkpoint with a lower lr.
    """
    from expander_sae import files
    from expander_sae.data import ActivationStore
    from expander_sae.environment import device_named
    from expander_sae.training import train as run
    from expander_sae.training.log import Trackers
    from expander_sae.training.recipe import FROM, parse_settings, read_config

    flags = {"preset": preset, "dictionary": dictionary, "d_sae": d_sae, "degree": degree, "k": k, "encoder": encoder}
    flags |= {"steps": steps, "batch_size": batch_size, "seed": seed, FROM: from_}
    given = {name: value for name, value in flags.items() if value is not None} | parse_settings(set_ or [])
    read = read_config(config) if config else {}
    source = ActivationStore.open(files.user_path(store))
    sae, recipe = _subject(source, read, given, device_named(device))
    summary = run(
        sae,
        source,
        recipe.train,
        out,
        recipe=recipe,
        restart=restart,
        replace=recipe.start is not None,
        trackers=Trackers(tuple(track or ()), track_project, track_name),
    )
    print(
        f"{out}: {sae.num_values:,} values, {files.human_bytes(sae.num_bytes)}, trained in {summary['seconds']:.1f} s"
    )


def _subject(
    source: ActivationStore, read: dict[str, Any], given: dict[str, Any], device: torch.device
) -> tuple[SAE, Recipe]:
    """The SAE to train, new or from elsewhere, and the recipe: of the config file ``read`` and what was ``given``."""
    from expander_sae.lm import preset_for
    from expander_sae.training import build_sae, load_sae
    from expander_sae.training.recipe import FROM, SAE_FIELDS, resolve

    start = given.get(FROM, read.get(FROM))
    if start is None:
        studied = preset_for(source.manifest.meta.model)
        recipe = resolve({"d_sae": studied.d_sae, "k": studied.k} if studied else {}, read, given)
        return build_sae(recipe.sae, source).to(device), recipe
    if decided := sorted(given.keys() & SAE_FIELDS):
        raise ValueError(
            f"{', '.join(decided)} cannot be set together with --from: {start} is trained further as it is"
        )
    sae = load_sae(start, device=device)
    # The recipe of the SAE's own run has its settings, too; it is asked for what the loop does.
    loop = {name: value for name, value in read.items() if name not in SAE_FIELDS}
    return sae, resolve(loop, given, {"encoder": sae.encoder.kind})
