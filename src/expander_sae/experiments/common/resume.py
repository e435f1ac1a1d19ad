"""An experiment in cells: each is computed once, written down at once, and skipped when the experiment is run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from expander_sae import files

CELLS_NAME = "cells.json"


class CellsError(ValueError):
    """The file of finished cells cannot be used; the message names it, the reason and the remedy."""


class Cells:
    """Finished cells of one experiment, in ``cells.json`` of its folder.

    Args:
        folder: where the experiment writes.
        settings: what every cell depends on (JSON values); a folder of other settings is refused.

    Raises:
        CellsError: the folder holds cells of other settings, or a file that is cut off, altered or of another version.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(folder) / CELLS_NAME
        self.settings = json.loads(json.dumps(settings))
        self.done: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            return
        before, self.done = self._read()
        names = sorted(before.keys() | self.settings.keys())
        different = [name for name in names if before.get(name) != self.settings.get(name)]
        if different:
            what = "; ".join(
                f"{name} was {before.get(name)!r} and is {self.settings.get(name)!r}" for name in different
            )
            raise CellsError(
                f"{self.path} belongs to an experiment with other settings: {what}. Choose another folder."
            )

    def _read(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CellsError(f"{self.path} cannot be read ({error}); delete it to start afresh") from None
        if not isinstance(saved, dict) or saved.get("sha256") != _hash(saved):
            raise CellsError(
                f"{self.path} was altered after it was written, or by another version: its contents do not match its "
                "sha256. Delete it to start afresh."
            )
        return saved["settings"], saved["cells"]

    def holds(self, key: str, of: str | None = None) -> bool:
        """Whether the cell ``key`` is there, computed from what has the hash ``of``; see :meth:`get`."""
        return key in self.done and (of is None or of == self.done[key]["of"])

    def get(self, key: str, compute: Callable[[], Any], of: Callable[[], str | None] = lambda: None) -> Any:
        """The cell ``key`` (a JSON value), computed and saved if it is not there yet.

        Args:
            key: the cell.
            compute: makes it.
            of: the hash of what the cell was computed from, such as an SAE's weights; asked after computing, and before
                a cell is used again. One of another hash is computed afresh; ``None`` (it is not there any more) is
                taken to be unchanged.
        """
        if key in self.done and self.holds(key, of()):
            return self.done[key]["value"]
        value = compute()
        self.done[key] = {"value": value, "of": of()}
        self.save()
        return value

    def save(self) -> None:
        """Write the file; :meth:`get` does it after every cell."""
        whole = {"settings": self.settings, "cells": self.done}
        files.atomic_write_json(self.path, whole | {"sha256": _hash(whole)})


def _hash(whole: Mapping[str, Any]) -> str:
    body = {key: value for key, value in whole.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
