"""Every page does what it says: snippets run, commands parse, links lead somewhere, tables render, names exist."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from support.house import PACKAGE, ROOT, SOURCE
from support.pages import (
    PAGES,
    Table,
    anchors,
    faults_of,
    fenced,
    inline_code,
    links,
    page_name,
    tables,
)

import expander_sae
from expander_sae.cli import app

COMMAND = "expander-sae"
MAKEFILE = (ROOT / "Makefile").read_text()
OTHERS = {"python", "pip", "cibuildwheel"}  # other projects' commands, as users know them
every_page = pytest.mark.parametrize("page", PAGES, ids=page_name)


@pytest.mark.parametrize("page", [page for page in PAGES if fenced(page.read_text(), "python")], ids=page_name)
def test_python_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for source in fenced(page.read_text(), "python"):
        exec(compile(source, page_name(page), "exec"), names)


def parse(words: list[str], *, whole: bool) -> None:
    """``ValueError`` unless the command and its options exist and, if it is shown ``whole``, its arguments suffice."""
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(command, "get_command") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        command = command.get_command(None, name)  # some groups find their commands when asked
        if command is None:
            raise ValueError(f"there is no command {name!r}")
    named = {name for option in command.params for name in option.opts + option.secondary_opts} | {"--help"}
    if unknown := [word for word in rest if word.startswith("--") and word.split("=")[0] not in named]:
        raise ValueError(f"{command.name} has no option {unknown[0]}")
    if whole and not hasattr(command, "get_command"):
        try:
            command.make_context(command.name, list(rest))
        except Exception as error:  # typer has its own copy of click's, or click's, by version
            if "UsageError" not in [kind.__name__ for kind in type(error).__mro__]:
                raise
            raise ValueError(str(error)) from None


def check_command(line: str, *, whole: bool) -> None:
    """``ValueError`` for what could not be typed."""
    words = shlex.split(line, comments=True)
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)] if words[:1] != ["make"] else words
    if words[0] == COMMAND:
        parse(words, whole=whole)
    elif words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        variables = [word.split("=")[0] for word in words[1:] if "=" in word]
        for pattern, names in ((r"^{}:", targets), (r"^{} \?=", variables)):
            for name in names:
                if not re.search(pattern.format(name), MAKEFILE, flags=re.MULTILINE):
                    raise ValueError(f"the Makefile has no {name!r}")
        for word in words[1:]:
            if word.startswith("DEMO="):
                parse([COMMAND, "demo", *shlex.split(word.removeprefix("DEMO="))], whole=True)
    elif words[0] not in OTHERS:
        raise ValueError(f"{words[0]!r} is no command of ours")


@every_page
def test_commands_can_be_typed(page: Path) -> None:
    text = page.read_text()
    for block in fenced(text, "console"):
        for line in block.splitlines():
            for command in filter(None, (part.strip() for part in line.split("#")[0].split("&&"))):
                if not command.startswith(". "):
                    check_command(command, whole=True)
    for code in inline_code(text):
        # An inline command may leave its required options out, and capitals stand for what the reader fills in.
        if re.match(rf"({COMMAND}|make) ", code):
            check_command(re.sub(r"\b[A-Z]{3,}\b(?!=).*", "", code), whole=False)


def test_the_check_of_commands_can_see() -> None:
    for line in (
        "expander-sae trian --out x",
        "expander-sae train --store a --out b --no-such-option 3",
        "expander-sae train --store a",
        "expander-sae reproduce nothing",
        "make bread",
        "make demo NOTHING=1",
        "make demo DEMO=--no-such-option",
        "curl somewhere",
    ):
        with pytest.raises(ValueError, match=r"\w"):
            check_command(line, whole=True)
    with pytest.raises(ValueError, match="no option --quck"):
        check_command("expander-sae demo --quck", whole=False)


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in links(text):
        if re.match(r"https?://", target):
            continue
        path, _, fragment = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        if fragment:
            assert fragment in anchors(place.read_text()), target


@every_page
def test_tables_render(page: Path) -> None:
    for table in tables(page.read_text()):
        assert not faults_of(table), (page_name(page), table.place, faults_of(table))


def test_the_check_of_tables_can_see() -> None:
    broken = Table(1, ("| term | meaning |", "|---|---|", "| expander | at least `|S|` rows |"))
    assert faults_of(broken) == ["row 3 has 4 cells, the heading 2"]
    assert faults_of(Table(1, ("| a | b |", "| 1 | 2 |"))) == ["its second line is no rule"]
    assert not faults_of(Table(1, (r"| a | `\|S\|` |", "|---|---:|")))


def test_the_readme_has_tables_of_a_width_to_read() -> None:
    for table in tables((ROOT / "README.md").read_text()):
        assert table.lines[0].count("|") - 1 <= 7, table.lines[0]


def test_every_figure_is_shown() -> None:
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page.read_text())}
    pictures = [path for kind in ("*.png", "*.svg") for path in (ROOT / "docs").rglob(kind)]
    assert pictures
    for picture in pictures:
        assert picture in shown, f"{page_name(picture)} is on no page"


@cache
def public_names() -> dict[str, Any]:
    """What the package and its subpackages export, by name."""
    found: dict[str, Any] = {}
    for module in [expander_sae, *(importlib.import_module(f"{PACKAGE}.{m.name}") for m in _subpackages())]:
        found |= {name: getattr(module, name) for name in getattr(module, "__all__", ())}
    return found


def _subpackages() -> list[pkgutil.ModuleInfo]:
    return [m for m in pkgutil.iter_modules(expander_sae.__path__) if m.ispkg and m.name != "cli"]


def resolve(dotted: str) -> None:
    """``ValueError`` unless the dotted name leads to something in the package."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(thing, part):
                raise ValueError(f"there is no {dotted}")
            thing = getattr(thing, part)
        return
    raise ValueError(f"there is no {dotted}")


@every_page
def test_names_exist(page: Path) -> None:
    text = page.read_text()
    for dotted in re.findall(rf"\b{PACKAGE}(?:\.\w+)+", text):
        if not (SOURCE.parent / dotted.replace(".", "/")).with_suffix(".py").exists():
            resolve(dotted)
    for code in inline_code(text):
        owner, _, attribute = code.partition(".")
        if re.fullmatch(r"[A-Z]\w+\.\w+(\(.*\))?", code) and owner in public_names():
            name = attribute.split("(")[0]
            fields = getattr(public_names()[owner], "__dataclass_fields__", {})
            assert hasattr(public_names()[owner], name) or name in fields, code
        elif re.fullmatch(r"[\w/]+\.py", code):
            assert any(path.exists() for path in (SOURCE / code, ROOT / code, page.parent / code)), code
        elif re.fullmatch(r"[\w-]+/", code):
            assert any(path.is_dir() for path in (SOURCE / code, ROOT / code)), code


def test_the_check_of_names_can_see() -> None:
    resolve("expander_sae.sae.SAE.num_values")
    for wrong in ("expander_sae.sae.SEA", "expander_sae.nothing", "expander_sae.sae.SAE.number"):
        with pytest.raises(ValueError, match="there is no"):
            resolve(wrong)
