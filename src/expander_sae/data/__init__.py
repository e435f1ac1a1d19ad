"""Activations: where they come from and the folder they are kept in."""

from __future__ import annotations

from expander_sae.data.manifest import MANIFEST, Manifest, StoreError, StoreMeta, planned_bytes
from expander_sae.data.sources import ActivationSource, TensorSource, prefetch
from expander_sae.data.store import ActivationStore
from expander_sae.data.writer import StoreWriter

__all__ = [
    "MANIFEST",
    "ActivationSource",
    "ActivationStore",
    "Manifest",
    "StoreError",
    "StoreMeta",
    "StoreWriter",
    "TensorSource",
    "planned_bytes",
    "prefetch",
]
