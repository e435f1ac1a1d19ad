"""Masks: which rows each column of a dictionary may use."""

from __future__ import annotations

from expander_sae.mask.constructions import CONSTRUCTIONS, Construction
from expander_sae.mask.mask import Mask, MaskRecipe, check_held, check_rows, sort_entries
from expander_sae.mask.structure import Overlap

__all__ = ["CONSTRUCTIONS", "Construction", "Mask", "MaskRecipe", "Overlap", "check_held", "check_rows", "sort_entries"]
