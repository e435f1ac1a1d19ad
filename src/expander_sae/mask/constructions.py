"""Mask constructions by name. A new one is a function (here or in a plug-in) and its entry in :data:`CONSTRUCTIONS`.

What each kind is, promises and is good for: docs/masks.md. Its bits are part of the file format: docs/formats.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from expander_sae.mask.algebraic import gf2, reed_solomon
from expander_sae.mask.controls import banded, clustered, hub, shared
from expander_sae.mask.sampled import balanced, bernoulli, left_regular, weighted
from expander_sae.registry import Registry

Draw = Callable[..., np.ndarray | tuple[np.ndarray, np.ndarray]]
"""``draw(m, n, d, seed, **options)``: int32 ``(n, d)``, distinct rows in ``[0, m)``, ascending along the last axis.

A kind whose columns differ in degree returns such rows ``(n, w)``, ``w`` the most that a column holds, and a bool
``(n, w)``: which of them are held, at least one in each column; the others are padding.

Raises ``ValueError`` for sizes and options that do not fit each other, and says what would.
"""


@dataclass(frozen=True)
class Construction:
    """How masks of one kind are drawn.

    Attributes:
        draw: see :data:`Draw`; its keyword arguments after ``seed`` are the options of the kind.
        version: raised when the same recipe draws other bits.
    """

    draw: Draw
    version: int = 1

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(inspect.signature(self.draw).parameters)[4:]


CONSTRUCTIONS: Registry[Construction] = Registry("mask kind")
"""Constructions by name."""
CONSTRUCTIONS.add("left-regular", Construction(left_regular))
CONSTRUCTIONS.add("balanced", Construction(balanced))
CONSTRUCTIONS.add("bernoulli", Construction(bernoulli))
CONSTRUCTIONS.add("weighted", Construction(weighted))
CONSTRUCTIONS.add("reed-solomon", Construction(reed_solomon))
CONSTRUCTIONS.add("gf2", Construction(gf2))
CONSTRUCTIONS.add("clustered", Construction(clustered))
CONSTRUCTIONS.add("shared", Construction(shared))
CONSTRUCTIONS.add("banded", Construction(banded))
CONSTRUCTIONS.add("hub", Construction(hub))
