"""What the experiments study: a language model at one layer, its activations, and SAEs trained on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from expander_sae import lm as language
from expander_sae.data import MANIFEST, ActivationSource, ActivationStore
from expander_sae.evaluation import InModel, SharedPasses, evaluate_in_model, evaluation_rows
from expander_sae.files import cache_dir
from expander_sae.sae import SAE
from expander_sae.sae.folder import CONFIG_NAME, read_config
from expander_sae.training import build_sae, train
from expander_sae.training.recipe import resolve

WINDOW = 256


@dataclass(frozen=True)
class Subject:
    """A language model, the layer studied and its text. Nothing is loaded before it is needed.

    Attributes:
        model: a short name of :data:`expander_sae.lm.MODELS`.
        layer: block whose output is studied.
        text: source of training and held-out text.
    """

    model: str
    layer: int
    text: str

    @classmethod
    def of(cls, model: str) -> Subject:
        """The subject of that short name. Raises ``ValueError`` for a model without a studied layer."""
        preset = language.preset_for(model)
        if preset is None:
            raise ValueError(f"no layer of {model!r} is known to the experiments; choose one of the named models")
        return cls(model, preset.layers[0], preset.text)

    def __str__(self) -> str:
        return f"{self.model} layer {self.layer}"

    @cached_property
    def lm(self) -> language.LanguageModel:
        """The language model, loaded at the first use."""
        return language.load_model(self.model)

    @cached_property
    def passes(self) -> SharedPasses:
        """Of the evaluations so far."""
        return SharedPasses()

    def activations(self, tokens: int, split: language.Split = "train") -> ActivationStore:
        """The store of ``tokens`` rows in the cache; harvested once, for the demo and the experiments alike."""
        tail = "" if split == "train" else f"-{split}"

        def folder(dtype: str) -> Path:
            return cache_dir() / "activations" / f"{self.model}-layer{self.layer}-{tokens}{tail}-{dtype}"

        for dtype in ("bfloat16", "float32"):
            if (folder(dtype) / MANIFEST).exists():
                store = ActivationStore.open(folder(dtype), allow_incomplete=True)
                if store.manifest.complete:
                    return store
        dtype = str(self.lm.dtype).removeprefix("torch.")
        return language.harvest(self.lm, self.text, self.layer, tokens, folder(dtype), split=split, window=WINDOW)

    def windows(self, count: int) -> list[Tensor]:
        """``count`` held-out windows of :data:`WINDOW` tokens."""
        return list(language.sample_windows(self.lm.tokenizer, self.text, "heldout", WINDOW, count))

    def read(self, readers: Mapping[str, SAE], windows: int) -> dict[str, InModel]:
        """:func:`~expander_sae.evaluation.evaluate_in_model` on so many held-out windows, sharing likewise."""
        return evaluate_in_model(readers, self.lm, self.windows(windows), self.layer, shared=self.passes)

    def evaluate(self, saes: Mapping[str, SAE], windows: int) -> list[dict[str, Any]]:
        """Rows of :func:`~expander_sae.evaluation.evaluation_rows` on so many held-out windows, in the model.

        One call after another shares what the model computes without an SAE.
        """
        return evaluation_rows(saes, self.lm, self.windows(windows), self.layer, shared=self.passes)


def trained(
    name: str, settings: Mapping[str, Any], source: ActivationSource, out: Path, start: SAE | None = None
) -> SAE:
    """The SAE ``name``, trained into ``out/name``, continued there, or taken as it is if it is finished.

    ``start``: train this one further instead of a fresh one; what the settings say of the SAE is not asked then.
    """
    recipe = resolve(settings)
    sae = build_sae(recipe.sae, source) if start is None else start
    train(sae, source, recipe.train, out / name, recipe=recipe, description=f"Train {name}")
    return sae


def sae_hash(folder: Path) -> str | None:
    """A hash of the SAE in ``folder``, whatever its metadata; ``None`` if there is none.

    Raises:
        SAEFolderError: the folder's config is damaged.
    """
    if not (folder / CONFIG_NAME).exists():
        return None
    same = {key: value for key, value in read_config(folder).items() if key not in ("metadata", "config_sha256")}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
