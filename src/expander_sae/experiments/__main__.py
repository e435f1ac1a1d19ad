"""``python -m expander_sae.experiments``: the page about the experiments, as Markdown."""

from __future__ import annotations

from expander_sae.experiments.registry import markdown

if __name__ == "__main__":
    print(markdown(), end="")
