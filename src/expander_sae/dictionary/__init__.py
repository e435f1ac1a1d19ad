"""Dictionaries: the matrix held still, and the module that learns it."""

from __future__ import annotations

from expander_sae.dictionary.basis import BASES, Basis, OrthogonalBasis, RotatedMatrix, basis_from
from expander_sae.dictionary.dictionary import (
    DICTIONARIES,
    DenseDictionary,
    Dictionary,
    ExpanderDictionary,
    dictionary_from,
    smallest_unsigned,
)
from expander_sae.dictionary.matrix import DenseMatrix, ExpanderMatrix, Matrix
from expander_sae.dictionary.pruning import prune
from expander_sae.dictionary.unit import unit_rows

__all__ = [
    "BASES",
    "DICTIONARIES",
    "Basis",
    "DenseDictionary",
    "DenseMatrix",
    "Dictionary",
    "ExpanderDictionary",
    "ExpanderMatrix",
    "Matrix",
    "OrthogonalBasis",
    "RotatedMatrix",
    "basis_from",
    "dictionary_from",
    "prune",
    "smallest_unsigned",
    "unit_rows",
]
