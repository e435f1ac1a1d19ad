"""Every snippet of the README runs: Python as it stands, commands as far as their options go."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expander_sae.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text()
MAKEFILE = (Path(__file__).parents[1] / "Makefile").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("source", blocks("python"))
def test_python_snippets_run(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "README.md", "exec"), {})


def test_console_snippets_name_commands_and_options_that_exist() -> None:
    lines = [line.split("#")[0].strip() for block in blocks("console") for line in block.splitlines() if line.strip()]
    commands = [shlex.split(line) for line in lines]
    assert {words[0] for words in commands} == {"make", "expander-sae"}
    for words in commands:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", MAKEFILE, flags=re.MULTILINE), words
        else:
            named = itertools.takewhile(lambda word: not word.startswith("--"), words[1:])
            path = [word for word in named if "/" not in word]  # a folder is an argument, not a command
            shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
            assert shown.exit_code == 0, shown.output
            for option in (word for word in words if word.startswith("--")):
                assert option in shown.output, (option, words)


def test_files_the_readme_points_to_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
