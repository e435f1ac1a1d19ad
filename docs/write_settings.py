"""Writes ``settings.md`` from the settings' own docstrings: ``python docs/write_settings.py``. A test compares."""

from __future__ import annotations

from pathlib import Path

from expander_sae.training.recipe import settings_markdown

PAGE = Path(__file__).parent / "settings.md"
HEAD = """# Settings

Written by `python docs/write_settings.py` from the fields of `SAEConfig` and `TrainConfig`; a test compares.

A recipe is a preset, then a config file (`--config`, YAML or JSON, flat), then flags; `--set name=value` sets anything
named here. The effective recipe is saved as `recipe.yaml` beside the result. Why and when: [training](training.md).

"""


def page() -> str:
    """The whole page."""
    return HEAD + settings_markdown()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print("wrote settings.md")
