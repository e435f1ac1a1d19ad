"""docs/settings.md is what the fields' docstrings say now."""

from __future__ import annotations

import re

from support.house import ROOT
from support.pages import script

from expander_sae.training.recipe import FIELDS

WRITER = script("write_settings.py")
PAGE = ROOT / "docs" / "settings.md"


def test_the_page_is_what_the_fields_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == WRITER.page(), "run python docs/write_settings.py"


def test_every_setting_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {name for name, _ in rows} >= set(FIELDS)
