"""The documentation as the tests see it: pages, fenced blocks, tables, links, headings."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from support.house import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fenced(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [body for found, body in _FENCE.findall(text) if found == language]


def prose(text: str) -> str:
    """The page without its fenced blocks and its indented ones."""
    lines = _FENCE.sub("", text).splitlines()
    return "\n".join(line for line in lines if not line.startswith("    "))


def inline_code(text: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text))


def links(text: str) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def anchor(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", text), flags=re.MULTILINE)}


def labels(text: str) -> set[str]:
    """Numbers of definitions and theorems: ``T9`` of ``### T9. Coherence …``."""
    return set(re.findall(r"^#+ ([A-Z]\d+)\. ", text, flags=re.MULTILINE))


def cells(line: str) -> list[str]:
    """A table row as GitHub parts it: at every bar that is not escaped, in code too."""
    return re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))


@dataclass(frozen=True)
class Table:
    """``lines``: heading, rule, rows. ``place``: number of the first line, from 1."""

    place: int
    lines: tuple[str, ...]


def tables(text: str) -> list[Table]:
    """Runs of lines that begin with a bar."""
    found: list[Table] = []
    run: list[str] = []
    for number, line in enumerate([*_FENCE.sub("", text).splitlines(), ""], start=1):
        if line.startswith("|"):
            run.append(line)
        elif run:
            found.append(Table(number - len(run), tuple(run)))
            run = []
    return found


def faults_of(table: Table) -> list[str]:
    """What keeps a table from rendering."""
    widths = [len(cells(line)) for line in table.lines]
    faults = [f"row {i + 1} has {w} cells, the heading {widths[0]}" for i, w in enumerate(widths) if w != widths[0]]
    rule = table.lines[1] if len(table.lines) > 1 else ""
    if not re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", rule.strip()):
        faults.append("its second line is no rule")
    return faults


def script(name: str) -> ModuleType:
    """A script of ``docs/``, imported."""
    spec = importlib.util.spec_from_file_location(f"docs_{name.removesuffix('.py')}", ROOT / "docs" / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
