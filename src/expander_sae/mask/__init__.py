"""Masks: which rows each column of a dictionary may use."""

from __future__ import annotations

from expander_sae.mask.constructions import CONSTRUCTIONS, Construction
from expander_sae.mask.mask import Mask, MaskRecipe, check_rows, sort_entries

__all__ = ["CONSTRUCTIONS", "Construction", "Mask", "MaskRecipe", "check_rows", "sort_entries"]
