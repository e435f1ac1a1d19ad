"""Registries: kinds by name, so that a new one touches its own file only."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class Registry(dict[str, T]):
    """Name to thing. An unknown name raises a ``ValueError`` that lists the choices, and the nearest one.

    Args:
        what: what the names stand for, as in ``"mask kind"``.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def __missing__(self, name: object) -> T:
        raise ValueError(unknown(self.what, name, self))

    def add(self, name: str, thing: T) -> T:
        """Register ``thing`` under a name that is free.

        Raises:
            ValueError: the name is taken.
        """
        if name in self:
            raise ValueError(f"there is a {self.what} {name!r} already")
        self[name] = thing
        return thing


def unknown(what: str, given: object, choices: Iterable[str]) -> str:
    """``unknown mask kind 'balnced'; did you mean 'balanced'? The choices are …``."""
    names = list(choices)
    near = get_close_matches(str(given), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {given!r}; {hint}choose one of {', '.join(map(repr, names))}"


def check_options(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ``ValueError`` if ``given`` names an option that ``what`` does not take."""
    known = list(known)
    for name in given:
        if name not in known:
            takes = f"it takes {', '.join(map(repr, known))}" if known else "it takes none"
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{what} has no option {name!r}; {hint}{takes}")
