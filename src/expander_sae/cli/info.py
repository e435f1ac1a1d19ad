"""``expander-sae info``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from expander_sae.cli.app import app

Facts = dict[str, Any]


@app.command(epilog="Example: [bold]expander-sae info runs/demo/expander-d7[/bold]")
def info(
    place: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="An SAE folder, a Hub id, a run (unfinished too), a checkpoint, a folder of several SAEs, or an "
            "activation store.",
        ),
    ],
) -> None:
    """What is there: sizes in values and bytes, signed codes or not, origin, training so far; hashes verified."""
    from expander_sae import files
    from expander_sae.data import MANIFEST
    from expander_sae.sae.folder import CONFIG_NAME
    from expander_sae.training.saved import checkpoint_of

    path = files.user_path(place)
    if (path / MANIFEST).exists():
        facts = _store(path)
    elif path.is_dir() and not (path / CONFIG_NAME).exists() and checkpoint_of(path) is None and _inside(path):
        _print_several(path, _inside(path))
        return
    else:
        facts = _sae(place)
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value if isinstance(value, str | int) else json.dumps(value)}")


def _store(path: Path) -> Facts:
    from expander_sae import files
    from expander_sae.data import ActivationStore

    store = ActivationStore.open(path, verify="sha256", allow_incomplete=True)
    manifest = store.manifest
    return {
        "activation store": f"{len(store):,} x {store.d_in}" + ("" if manifest.complete else " (unfinished)"),
        "on disk": f"{files.human_bytes(manifest.num_bytes)} in {len(manifest.shards)} shards",
        "left out": f"{manifest.left_out_by_position:,} by position, {manifest.left_out_by_norm:,} by norm",
        **vars(manifest.meta),
        "hashes": f"all {len(manifest.shards)} shards match their SHA-256",
    }


def _sae(place: str) -> Facts:
    from expander_sae import files
    from expander_sae.training import load_sae
    from expander_sae.training.saved import checkpoint_of

    sae, checkpoint = load_sae(place), checkpoint_of(place)
    config, run = sae.config(), sae.metadata.get("training")
    hashes = "files and mask match their SHA-256"
    unfinished = {}
    if checkpoint is not None:
        hashes = "checkpoint and mask match their SHA-256"
        unfinished = {"checkpoint": f"{checkpoint}, {_progress(run)}: `train --from` it, or the same command, goes on"}
    return {
        "SAE": f"{config['dictionary']['kind']}, {config['encoder']['kind']} encoder",
        **unfinished,
        "d_in x d_sae": f"{sae.d_in:,} x {sae.d_sae:,}",
        "k": sae.k,
        "learned values": f"{sae.num_values:,}",
        "bytes of weights": f"{sae.num_bytes:,} ({files.human_bytes(sae.num_bytes)})",
        **config["dictionary"],
        "sparsity": config["sparsity"],
        "signed codes": "yes" if sae.signed else "no",
        **_certificate(sae.certificate),
        **sae.metadata,
        "hashes": hashes,
    }


def _certificate(stored: Facts | None) -> Facts:
    """A certificate of ours in one line; loading has made sure that it is of this dictionary."""
    from expander_sae.theory import KIND, Certificate, one_line

    if stored is None:
        return {}
    return {"certificate": one_line(Certificate.from_dict(stored)) if stored.get("kind") == KIND else stored}


def _inside(path: Path) -> list[Path]:
    """Folders right below that hold an SAE or a run."""
    from expander_sae.sae.folder import CONFIG_NAME
    from expander_sae.training.saved import checkpoint_of

    below = sorted(child for child in path.iterdir() if child.is_dir())
    return [child for child in below if (child / CONFIG_NAME).exists() or checkpoint_of(child) is not None]


def _print_several(path: Path, folders: list[Path]) -> None:
    from expander_sae import files
    from expander_sae.report.table import Column, print_table
    from expander_sae.training import load_sae
    from expander_sae.training.saved import checkpoint_of

    rows = []
    for folder in folders:
        sae = load_sae(folder)
        run = sae.metadata.get("training")
        dictionary = sae.dictionary.kind + (f" d={sae.dictionary.degree}" if sae.dictionary.degree else "")
        fvu = (sae.metadata.get("metrics") or {}).get("fvu")
        rows.append({
            "name": folder.name,
            "kind": f"{dictionary}, {sae.encoder.kind}",
            "sizes": f"{sae.d_in:,} x {sae.d_sae:,}, k={sae.k}",
            "signed": "yes" if sae.signed else "no",
            "values": f"{sae.num_values:,} ({files.human_bytes(sae.num_bytes)})",
            "run": "–" if run is None else _progress(run) if checkpoint_of(folder) else "finished",
            "fvu": "–" if fvu is None else f"{fvu:.3f}",
        })  # fmt: skip
    headings = {
        "name": "SAE", "kind": "dictionary, encoder", "sizes": "d_in x d_sae", "signed": "signed codes",
        "values": "values", "run": "training", "fvu": "FVU",
    }  # fmt: skip
    print_table(rows, [Column(heading, lambda row, key=key: row[key]) for key, heading in headings.items()])
    print(f"{len(rows)} SAEs in {path}; all hashes match.")


def _progress(run: Facts | None) -> str:
    return "of a run" if run is None else f"{run['steps']:,} of {run['config']['steps']:,} steps done"
