"""The house, floor by floor: what the architecture test checks and ``docs/draw.py`` draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "expander_sae"
SOURCE = ROOT / "src" / PACKAGE


@dataclass(frozen=True)
class Floor:
    """Packages and modules that stand side by side.

    Attributes:
        name: in a word or two.
        entries: modules or packages; each imports only entries before it, on its own floor too.
        knows: what they deal in, for picture and table.
    """

    name: str
    entries: tuple[str, ...]
    knows: str


FLOORS = (
    Floor("ground", ("registry", "fields", "stored", "files", "progress", "environment"), "names, disks, terminals"),
    Floor("masks", ("mask",), "supports, and recipes that redraw them bit for bit"),
    Floor("operations", ("ops",), "gather, reduce, select: reference, C++, Triton"),
    Floor("dictionaries", ("dictionary",), "learned columns; the matrix held still"),
    Floor("solvers", ("pursuit",), "OMP and its relatives on any matrix"),
    Floor("theory", ("theory",), "expansion, coherence, certificates"),
    Floor("SAE", ("sae",), "who scores, who selects; folders and the Hub"),
    Floor("activations", ("data",), "rows from memory or disk: shards, manifest"),
    Floor("language models", ("lm",), "load, read text, hook, harvest, splice"),
    Floor("training", ("training",), "the loop, recipes, checkpoints, log"),
    Floor("evaluation", ("evaluation",), "metrics on rows and inside the model"),
    Floor("other formats", ("interop", "features"), "other libraries' SAEs; the feature index"),
    Floor("results", ("report", "experiments"), "tables, pictures, whole runs"),
    Floor("commands", ("cli", "__main__"), "flags"),
)
"""From the ground floor to the roof. Floors without files yet have their place here and none in the picture."""

HOUSE = [entry for floor in FLOORS for entry in floor.entries]


def is_built(entry: str) -> bool:
    """Whether there is such a module or package."""
    return (SOURCE / f"{entry}.py").exists() or (SOURCE / entry / "__init__.py").exists()


def floors_built() -> list[Floor]:
    """The floors that have files, each with the entries that exist and are not the interpreter's affair."""
    found = []
    for floor in FLOORS:
        entries = tuple(entry for entry in floor.entries if is_built(entry) and not entry.startswith("_"))
        if entries:
            found.append(Floor(floor.name, entries, floor.knows))
    return found
