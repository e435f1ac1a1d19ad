"""An experiment in cells: each is computed once, written down at once, and skipped when the experiment is run again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from expander_sae import files

CELLS_NAME = "cells.json"


class Cells:
    """Finished cells of one experiment, in ``cells.json`` of its folder.

    Args:
        folder: where the experiment writes.
        settings: what every cell depends on (JSON values); a folder of other settings is refused.

    Raises:
        ValueError: the folder holds cells of other settings, or a file that cannot be read.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(folder) / CELLS_NAME
        self.settings = json.loads(json.dumps(settings))
        self.done: dict[str, Any] = {}
        if not self.path.exists():
            return
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            before, self.done = saved["settings"], saved["cells"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} cannot be read ({error}); delete it to start afresh") from None
        names = sorted(before.keys() | self.settings.keys())
        different = [name for name in names if before.get(name) != self.settings.get(name)]
        if different:
            what = "; ".join(
                f"{name} was {before.get(name)!r} and is {self.settings.get(name)!r}" for name in different
            )
            raise ValueError(
                f"{self.path} belongs to an experiment with other settings: {what}. Choose another folder."
            )

    def __contains__(self, key: str) -> bool:
        return key in self.done

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The cell ``key`` (a JSON value), computed and saved if it is not there yet."""
        if key not in self.done:
            self.done[key] = compute()
            files.atomic_write_json(self.path, {"settings": self.settings, "cells": self.done})
        return self.done[key]
