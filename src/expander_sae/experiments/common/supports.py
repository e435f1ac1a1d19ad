"""Arms that differ in the supports of the columns, or in the basis they lie in, and in nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from expander_sae.data import ActivationSource, RotatedSource, principal_axes, random_rotation, rotated
from expander_sae.experiments.common.subject import trained
from expander_sae.mask import CONSTRUCTIONS, Mask
from expander_sae.sae import SAE, pruned

LEARNED = "learned"
BASIS_SAMPLE = 16_384
"""Activations that principal axes and variances of coordinates are taken of."""


@dataclass(frozen=True)
class Arm:
    """One way to choose supports.

    Attributes:
        mask: a kind of mask, or :data:`LEARNED`: the largest entries of each column of a trained dense SAE.
        basis: the coordinates that the supports are sets of: the model's own, those after a rotation drawn at random
            (one for each seed), or the principal axes of the training activations.
    """

    mask: str
    basis: Literal["standard", "random", "pca"] = "standard"


ARMS: dict[str, Arm] = {
    "left-regular": Arm("left-regular"),
    "balanced": Arm("balanced"),
    "reed-solomon": Arm("reed-solomon"),
    "clustered": Arm("clustered"),
    "shared": Arm("shared"),
    "banded": Arm("banded"),
    "hub": Arm("hub"),
    "weighted": Arm("weighted"),
    "learned": Arm(LEARNED),
    "random-basis": Arm("left-regular", "random"),
    "pca-basis": Arm("left-regular", "pca"),
    "pca-basis-weighted": Arm("weighted", "pca"),
}
"""By name. Weighted masks draw rows in proportion to the standard deviation of the coordinate, plus a uniform floor."""
REFERENCE = "left-regular"


def refusal(kind: str, d_in: int, d_sae: int, degree: int) -> str | None:
    """Why there is no mask of that kind and size; ``None`` if there is one. Raises ``ValueError`` for no known kind."""
    CONSTRUCTIONS[kind]
    try:
        Mask.build(kind, d_in=d_in, d_sae=d_sae, degree=degree)
    except ValueError as impossible:
        return str(impossible)
    return None


class Supports:
    """SAEs of one size on any arm's supports, trained in a folder with recipes that differ in nothing else.

    Args:
        source: activations in the model's own coordinates.
        out: the folder.
        d_sae, k: of every SAE.
        training: settings of every training beside preset and seed, by preset.
    """

    def __init__(
        self, source: ActivationSource, out: Path, d_sae: int, k: int, training: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.source, self.out = source, out
        self.sizes = {"d_sae": d_sae, "k": k}
        self.training = training
        sample = source.sample(min(BASIS_SAMPLE, len(source)), 0).float()
        self._sample = sample
        self.axes = cache(lambda: principal_axes(sample)[0])

    def rotation(self, arm: Arm, seed: int) -> Tensor | None:
        """Of the arm's basis, ``(m, m)``; ``None`` for the model's own coordinates."""
        if arm.basis == "standard":
            return None
        return self.axes() if arm.basis == "pca" else random_rotation(self.source.d_in, seed)

    def options(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Options of the arm's mask."""
        if arm.mask != "weighted":
            return {}
        rotation = self.rotation(arm, seed)
        sample = self._sample if rotation is None else rotated(self._sample, rotation)
        variances = sample.double().var(dim=0)
        # Six digits: they are kept in the recipe of the mask, as text.
        return {"weights": [float(f"{one:.6g}") for one in (variances / variances.max()).tolist()]}

    def sae(self, name: str, arm: Arm, preset: str, degree: int, seed: int, changes: Mapping[str, Any] = {}) -> SAE:
        """The arm's SAE, trained into ``out/name``; ``changes``: to the settings of its training.

        Raises:
            ValueError: there is no such mask at this size.
        """
        rotation = self.rotation(arm, seed)
        source = self.source if rotation is None else RotatedSource(self.source, rotation)
        shared = {"preset": preset, "seed": seed} | self.sizes | self.training[preset]
        settings = shared | changes | {"degree": degree}
        if arm.mask != LEARNED:
            drawn = {"mask": arm.mask, "mask_options": self.options(arm, seed)}
            return trained(name, settings | drawn, source, self.out)
        # One dense SAE serves all degrees, so it does not share the changes.
        dense = trained(self.dense_name(preset, seed), shared | {"dictionary": "dense"}, source, self.out)
        return trained(name, settings, source, self.out, start=pruned(dense, degree))

    @staticmethod
    def dense_name(preset: str, seed: int) -> str:
        """Folder of the dense SAE that learned supports are taken from."""
        return f"dense-{preset}-seed{seed}"
