"""Masks: which rows each column of a dictionary may use."""

from __future__ import annotations

from expander_sae.mask.mask import KINDS, Mask, MaskRecipe, check_rows

__all__ = ["KINDS", "Mask", "MaskRecipe", "check_rows"]
