"""Expander SAEs: sparse autoencoders whose dictionary lives on an expander mask (arXiv 2607.01799)."""

from __future__ import annotations

__version__ = "0.1.0"
