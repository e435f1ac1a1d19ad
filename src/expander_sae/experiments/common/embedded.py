"""What the experiments on the embedded model share: its activations, its SAEs, figures over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expander_sae import lm as language
from expander_sae.data import MANIFEST, ActivationStore
from expander_sae.files import cache_dir
from expander_sae.sae import SAE
from expander_sae.training.recipe import Recipe, resolve
from expander_sae.training.trainer import train

PRESET = language.PRESETS[language.EMBEDDED]
LAYER = PRESET.layers[0]
WINDOW = 256


def activations(tokens: int, split: language.Split = "train") -> ActivationStore:
    """The store of ``tokens`` rows of the embedded model; harvested once, by the demo and the experiments alike.

    The language model is loaded only if the store is not there.
    """
    tail = "" if split == "train" else f"-{split}"

    def folder(dtype: str) -> Path:
        return cache_dir() / "activations" / f"{language.EMBEDDED}-layer{LAYER}-{tokens}{tail}-{dtype}"

    for dtype in ("bfloat16", "float32"):
        if (folder(dtype) / MANIFEST).exists():
            store = ActivationStore.open(folder(dtype), allow_incomplete=True)
            if store.manifest.complete:
                return store
    lm = language.load_model(language.EMBEDDED)
    dtype = str(lm.dtype).removeprefix("torch.")
    return language.harvest(lm, language.EMBEDDED, LAYER, tokens, folder(dtype), split=split, window=WINDOW)


def train_arm(name: str, recipe: Recipe, store: ActivationStore, out: Path) -> SAE:
    """Train one SAE into ``out``, or continue, or take it as it is if it was finished with these settings."""
    sae = recipe.sae.build(store.d_in)
    sae.metadata["trained_on"] = store.origin()
    train(sae, store, recipe.train, out, description=f"Train {name}")
    return sae


def trained(name: str, settings: Mapping[str, Any], store: ActivationStore, out: Path) -> SAE:
    """The SAE ``name``, trained into ``out/name`` or taken from there."""
    return train_arm(name, resolve(settings), store, out / name)


def sizes_without_seeds(size: Any) -> dict[str, Any]:
    """What a cell of one seed depends on: seeds may be added to a finished folder. ``size``: a dataclass."""
    return {name: value for name, value in asdict(size).items() if name != "seeds"}


def over_seeds(rows: Iterable[Mapping[str, Any]], same: Sequence[str], figures: Sequence[str]) -> list[dict[str, Any]]:
    """One row for all that agree in the columns ``same``: mean and sample deviation (``..._sd``) of the ``figures``.

    A deviation of a single run is ``None``. Other columns are those of the first run.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in same), []).append(row)
    merged = []
    for members in groups.values():
        joined: dict[str, Any] = {key: value for key, value in members[0].items() if key != "seed"}
        joined["runs"] = len(members)
        for figure in figures:
            found = [member[figure] for member in members if member.get(figure) is not None]
            joined[figure] = statistics.fmean(found) if found else None
            joined[f"{figure}_sd"] = statistics.stdev(found) if len(found) > 1 else None
        merged.append(joined)
    return merged
