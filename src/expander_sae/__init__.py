"""Expander SAEs: sparse autoencoders whose dictionary lives on an expander mask (arXiv 2607.01799)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from expander_sae.mask import Mask
    from expander_sae.ops import SparseCode
    from expander_sae.sae import SAE

__all__ = ["SAE", "Mask", "SparseCode", "__version__"]

_HOMES = {"Mask": "mask", "SAE": "sae", "SparseCode": "ops"}


def __getattr__(name: str) -> Any:
    # On first use: `expander-sae --help` need not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
