"""No file points to a document, a section or a theorem that is not in the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.house import ROOT
from support.pages import PAGES, labels, page_name

FOLDERS = ("src", "csrc", "tests", "benchmarks", "docs")
KINDS = {".py", ".h", ".cpp", ".md", ".txt", ".toml", ".yaml", ".yml", ".cff"}
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in KINDS and path.is_file() and "__pycache__" not in path.parts
) + [path for path in sorted(ROOT.iterdir()) if path.suffix in KINDS or path.name in ("Makefile", ".ci/run")]

# Documents that lie elsewhere. In pieces, so that this file does not find itself.
ELSEWHERE = re.compile("DES" r"IGN(?=[ .,)]|$)|THE" "ORY|ECO" "SYSTEM")
PAGE = re.compile(r"\bdocs/(\w+)\.md((?: (?:and )?[A-Z]\d+,?)*)")
# A section of a paper is named after it, as in "Gao et al. 2024, §2.4"; we have no sections of our own.
OUR_SECTION = re.compile(r"(?<!\d{4}, )(?<!\d{5}, )(?<!\d{5}\), )§")


def dangling(text: str) -> list[str]:
    """References that lead nowhere."""
    found = [match.group() for match in ELSEWHERE.finditer(text)]
    found += [match.group() for match in OUR_SECTION.finditer(text)]
    for name, numbers in PAGE.findall(text):
        path = ROOT / "docs" / f"{name}.md"
        if not path.exists():
            found.append(f"docs/{name}.md")
            continue
        known = labels(path.read_text())
        found += [f"docs/{name}.md {number}" for number in re.findall(r"[A-Z]\d+", numbers) if number not in known]
    return found


@pytest.mark.parametrize("path", FILES, ids=page_name)
def test_references_lead_somewhere(path: Path) -> None:
    if path == Path(__file__):
        pytest.skip("holds wrong references on purpose")
    found = dangling(path.read_text(encoding="utf-8"))
    assert not found


def test_the_check_can_see() -> None:
    assert not dangling("docs/theory.md T9, T10 and S2; Gao et al. 2024, §2.4; arXiv 2406.04093, §2.3")
    assert set(dangling("see THEORY C.10, DESIGN §4")) == {"DESIGN", "THEORY", "§"}
    assert dangling("docs/nothing.md") == ["docs/nothing.md"]
    assert dangling("docs/theory.md T1, T99") == ["docs/theory.md T99"]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_numbers_on_pages_exist(page: Path) -> None:
    """``T9`` in prose is a theorem of docs/theory.md."""
    text = re.sub(r"`[^`\n]+`", "", page.read_text())
    known = labels((ROOT / "docs" / "theory.md").read_text())
    for number in re.findall(r"\b[DTSP]\d{1,2}\b", text):
        assert number in known, (page_name(page), number)
