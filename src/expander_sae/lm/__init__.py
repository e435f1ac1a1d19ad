"""Language models: load one, read its residual stream at a layer, put another back, harvest."""

from __future__ import annotations

from expander_sae.lm.embedded import EMBEDDED, EmbeddedError, Split, fetch_model, fetch_text
from expander_sae.lm.harvest import harvest
from expander_sae.lm.hook import continue_from, residual, splice
from expander_sae.lm.models import PRESETS, LanguageModel, ModelError, ModelPreset, find_blocks, load_model, preset_for
from expander_sae.lm.text import PILE, TextError, documents, pack, sample_windows

__all__ = [
    "EMBEDDED",
    "PILE",
    "PRESETS",
    "EmbeddedError",
    "LanguageModel",
    "ModelError",
    "ModelPreset",
    "Split",
    "TextError",
    "continue_from",
    "documents",
    "fetch_model",
    "fetch_text",
    "find_blocks",
    "harvest",
    "load_model",
    "pack",
    "preset_for",
    "residual",
    "sample_windows",
    "splice",
]
