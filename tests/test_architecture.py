"""The house: every module imports only what stands before it, and nothing in the tree names a machine or a registry."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.house import HOUSE, PACKAGE, ROOT, SOURCE

MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def name_of(path: Path) -> str:
    """``lm.hook`` for ``lm/hook.py``, ``lm`` for ``lm/__init__.py``."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def resolved(module: str, imported: list[str]) -> list[str]:
    """Our modules behind ``from module import imported``: a name may be a module itself."""
    inside = [f"{module}.{name}".strip(".") for name in imported]
    return [name if name in NAMES else module for name in inside]


def our_imports(path: Path) -> set[str]:
    """Modules of the package, without its name, that the file imports anywhere, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
            found |= {name.removeprefix(PACKAGE).strip(".") for name in names}
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level:
                here = path.relative_to(SOURCE).parts[:-1]
                base = list(here[: len(here) - node.level + 1])
                found |= set(resolved(".".join(base + ([node.module] if node.module else [])), names))
            elif node.module and node.module.split(".")[0] == PACKAGE:
                found |= set(resolved(node.module.removeprefix(PACKAGE).strip("."), names))
    return found - {""}  # the package itself: the version


def floor(module: str) -> str:
    return module.split(".")[0]


def height(module: str) -> int:
    """Where its floor is; a module without one (which has a test of its own) stands nowhere."""
    return HOUSE.index(floor(module)) if floor(module) in HOUSE else -1


def test_every_module_has_its_floor() -> None:
    assert {floor(name) for name in NAMES} <= set(HOUSE)
    assert len(HOUSE) == len(set(HOUSE))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    above = {name for name in our_imports(path) if height(name) > height(name_of(path)) >= 0}
    assert not above, f"{name_of(path)} imports {', '.join(sorted(above))}, which stand above it"


def test_no_circles_inside_a_package() -> None:
    # A package's __init__ gathers its modules; what they import from it is checked as an import of a module.
    graph = {name_of(path): (our_imports(path) & NAMES) - {name_of(path)} for path in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def test_the_check_can_see(tmp_path: Path) -> None:
    planted = SOURCE / "lm" / "planted.py"
    samples = {
        "from expander_sae.training.trainer import train": {"training.trainer"},
        "from expander_sae import cli, __version__": {"cli"},
        "import expander_sae.lm.hook": {"lm.hook"},
        "from ..sae import SAE": {"sae"},
        "from .. import sae": {"sae"},
        "from . import hook": {"lm.hook"},
        "from .hook import residual": {"lm.hook"},
        "def f():\n    from expander_sae.report.table import print_table": {"report.table"},
        "import torch\nfrom json import loads": set(),
    }

    class File:
        """A file that stands in ``lm`` without being written there."""

        def __init__(self, text: str) -> None:
            self.text = text

        def read_text(self) -> str:
            return self.text

        relative_to = staticmethod(planted.relative_to)

    for text, expected in samples.items():
        assert our_imports(File(text)) == expected, text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "path", [path for path in MODULES if floor(name_of(path)) in HOUSE[: HOUSE.index("lm")]], ids=name_of
)
def test_what_stands_below_the_language_models_knows_nothing_of_them(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            imported.add(node.module.split(".")[0])
    assert not imported & {"transformers", "datasets", "tokenizers", "gensim", "gguf", "typer", "matplotlib"}


@pytest.mark.parametrize("path", [SOURCE / "__init__.py", *MODULES], ids=lambda path: name_of(path) or PACKAGE)
def test_modules_are_explained_and_of_a_size_to_read(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is"
    assert "from __future__ import annotations" in text or len(tree.body) == 1
    assert len(text.splitlines()) <= 450, "a file past 400 lines asks to be two"


@pytest.mark.parametrize("path", [path for path in MODULES if "__all__" in path.read_text()], ids=name_of)
def test_all_is_true(path: Path) -> None:
    module = importlib.import_module(f"{PACKAGE}.{name_of(path)}")
    names = module.__all__
    assert len(names) == len(set(names))
    for name in names:
        assert hasattr(module, name), name
        assert not name.startswith("_"), name


def test_the_package_offers_three_names_and_a_version() -> None:
    package = importlib.import_module(PACKAGE)
    assert sorted(package.__all__) == ["Mask", "SAE", "SparseCode", "__version__"]
    for name in package.__all__:
        assert getattr(package, name)


OUTSIDE = [path for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]


def owner(path: Path) -> str:
    """The floor whose private names a file may use: its own, for a test that of the folder it stands in."""
    if path.is_relative_to(SOURCE):
        return floor(name_of(path))
    inside = path.relative_to(ROOT).parts
    return inside[1] if inside[0] == "tests" and len(inside) > 2 else ""


def private_names(tree: ast.Module, own: str) -> list[str]:
    """Names with a leading underscore that code of the floor ``own`` takes from another floor of the package."""
    found: list[str] = []
    bound: dict[str, str] = {}  # local name: the floor it comes from
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level or (node.module or "").split(".")[0] != PACKAGE:
            continue
        inside = str(node.module).removeprefix(PACKAGE).strip(".")
        for alias in node.names:
            home = floor(inside or alias.name)
            if home == "_kernels" and own in ("ops", "pursuit"):  # their compiled half
                continue
            bound[alias.asname or alias.name] = home
            if any(part.startswith("_") for part in (*inside.split("."), alias.name)) and home != own:
                found.append(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            hidden = node.attr.startswith("_") and not node.attr.startswith("__")
            if hidden and bound[node.value.id] != own:
                found.append(f"{node.value.id}.{node.attr}")
    return [name for name in found if not name.endswith(".__version__")]


@pytest.mark.parametrize("path", [*MODULES, *OUTSIDE], ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_private_stays_in_its_package(path: Path) -> None:
    """In the package, in its tests and in the benchmarks."""
    found = private_names(ast.parse(path.read_text()), owner(path))
    assert not found


def test_the_check_of_private_names_can_see() -> None:
    samples = {
        "from expander_sae.sae.folder import _config_hash": ["expander_sae.sae.folder._config_hash"],
        "from expander_sae.sae import folder\nfolder._config_hash({})": ["folder._config_hash"],
        "from expander_sae import _kernels": ["expander_sae._kernels"],
        "from expander_sae.lm.hook import _splice": [],
        "from expander_sae import __version__": [],
        "import numpy as np\nnp._core": [],
    }
    for text, expected in samples.items():
        assert private_names(ast.parse(text), "lm") == expected, text


def test_help_does_not_wait_for_torch() -> None:
    check = "import sys, expander_sae.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


# In pieces, so that this file does not find itself.
FORBIDDEN = {
    "a package registry's host": re.compile(
        "py" r"pi\.org|python" r"hosted\.org|download\.py" r"torch\.org|ana" r"conda\.org", re.I
    ),
    "a path of one machine": re.compile(r"(?<![\w.~}])/(?:work|root|home|Users|tmp|mnt)" r"/[\w.-]"),
}


def tracked_files() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what: str) -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in FORBIDDEN[what].finditer(text)]
    assert not found, "\n".join(found)


def test_the_tree_holds_no_weights_and_no_large_files() -> None:
    for path in tracked_files():
        assert path.suffix not in {".safetensors", ".gguf", ".pt", ".bin", ".npy", ".npz", ".pkl", ".whl", ".so"}, path
        assert path.stat().st_size < 1_000_000, path
