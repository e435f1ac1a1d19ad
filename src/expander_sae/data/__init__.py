"""Activations: where they come from and the folder they are kept in."""

from __future__ import annotations

from expander_sae.data.sources import ActivationSource, TensorSource
from expander_sae.data.store import ActivationStore, Manifest, StoreError, StoreMeta, StoreWriter

__all__ = [
    "ActivationSource",
    "ActivationStore",
    "Manifest",
    "StoreError",
    "StoreMeta",
    "StoreWriter",
    "TensorSource",
]
