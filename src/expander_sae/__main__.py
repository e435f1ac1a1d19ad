"""``python -m expander_sae``: the command line."""

from __future__ import annotations

from expander_sae.cli import main

main()
