"""The commands, thin: parse, call the library, show the result."""

from __future__ import annotations

from expander_sae.cli import certify, demo, evaluate, harvest, info, reproduce, train  # in the order of --help
from expander_sae.cli.app import app

__all__ = ["app", "certify", "demo", "evaluate", "harvest", "info", "main", "reproduce", "train"]


def main() -> None:
    """Entry point."""
    app()
