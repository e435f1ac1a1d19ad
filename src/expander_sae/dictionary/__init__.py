"""Dictionaries: the matrix held still, and the module that learns it."""

from __future__ import annotations

from expander_sae.dictionary.dictionary import (
    DenseDictionary,
    DenseMatrix,
    Dictionary,
    ExpanderDictionary,
    ExpanderMatrix,
    Matrix,
    dictionary_from,
    smallest_unsigned,
    unit_rows,
)

__all__ = [
    "DenseDictionary",
    "DenseMatrix",
    "Dictionary",
    "ExpanderDictionary",
    "ExpanderMatrix",
    "Matrix",
    "dictionary_from",
    "smallest_unsigned",
    "unit_rows",
]
