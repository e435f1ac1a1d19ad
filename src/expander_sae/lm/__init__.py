"""Language models: load one, read its activations at a site, put others back, harvest."""

from __future__ import annotations

from expander_sae.lm.embedded import EMBEDDED, EmbeddedError, Split, fetch_model, fetch_text
from expander_sae.lm.harvest import HarvestOptions, harvest, harvest_many
from expander_sae.lm.hook import capture, continue_from, residual, splice
from expander_sae.lm.identity import is_commit, mismatches
from expander_sae.lm.intervene import Clean, Intervention
from expander_sae.lm.load import ModelError, load_model
from expander_sae.lm.models import LanguageModel, find_blocks
from expander_sae.lm.norms import NormGuard
from expander_sae.lm.packing import Separator, pack, special_ids, structural_ids, wants_bos
from expander_sae.lm.presets import MODELS, ModelPreset, preset_for
from expander_sae.lm.readers import TextError
from expander_sae.lm.sites import HOOKS, Hook, Site
from expander_sae.lm.text import PILE, documents, sample_windows

__all__ = [
    "EMBEDDED",
    "HOOKS",
    "MODELS",
    "PILE",
    "Clean",
    "EmbeddedError",
    "HarvestOptions",
    "Hook",
    "Intervention",
    "LanguageModel",
    "ModelError",
    "ModelPreset",
    "NormGuard",
    "Separator",
    "Site",
    "Split",
    "TextError",
    "capture",
    "continue_from",
    "documents",
    "fetch_model",
    "fetch_text",
    "find_blocks",
    "harvest",
    "harvest_many",
    "is_commit",
    "load_model",
    "mismatches",
    "pack",
    "preset_for",
    "residual",
    "sample_windows",
    "special_ids",
    "splice",
    "structural_ids",
    "wants_bos",
]
