"""Language models: load one, read its residual stream at a layer, put another back, harvest."""

from __future__ import annotations

from .embedded import EMBEDDED, EmbeddedError, Split, fetch_model, fetch_text
from .harvest import harvest
from .hook import continue_from, residual, splice
from .models import PRESETS, LanguageModel, ModelError, ModelPreset, find_blocks, load_model, preset_for
from .text import PILE, TextError, documents, pack, sample_windows

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
