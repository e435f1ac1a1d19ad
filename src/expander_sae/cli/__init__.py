"""The command line."""

from __future__ import annotations

from expander_sae.cli.app import main

__all__ = ["main"]
