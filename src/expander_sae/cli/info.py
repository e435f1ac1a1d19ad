"""``expander-sae info``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from expander_sae.cli.app import app


@app.command(epilog="Example: [bold]expander-sae info runs/demo/expander-d7[/bold]")
def info(
    folder: Annotated[str, typer.Argument(help="An SAE folder, a Hub id, or an activation store.")],
) -> None:
    """What an SAE folder or an activation store is: sizes in values and bytes, origin, hashes verified."""
    from expander_sae import files
    from expander_sae.data import MANIFEST, ActivationStore
    from expander_sae.sae import SAE

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
            "signed codes": "yes" if sae.signed else "no",
            **sae.metadata,
            "hashes": "files and mask match their SHA-256",
        }
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value if isinstance(value, str | int) else json.dumps(value)}")
