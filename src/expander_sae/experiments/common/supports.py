"""Arms that differ in the supports of the columns, or in the basis they lie in, and in nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from expander_sae.data import ActivationSource
from expander_sae.dictionary import ExpanderDictionary
from expander_sae.experiments.common.published import MASKS
from expander_sae.experiments.common.resume import Cells
from expander_sae.experiments.common.seeds import without_seeds
from expander_sae.experiments.common.subject import Subject, sae_hash, trained
from expander_sae.mask import CONSTRUCTIONS, Mask
from expander_sae.registry import unknown
from expander_sae.sae import SAE, pruned
from expander_sae.training.recipe import resolve
from expander_sae.training.start import build_sae, covariance_of

LEARNED = "learned"


@dataclass(frozen=True)
class Arm:
    """One way to choose supports.

    Attributes:
        mask: a kind of mask, or :data:`LEARNED`: the largest entries of each column of a trained dense SAE.
        basis: what the columns are written in; a random one is another for each seed.
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
    "bernoulli": Arm("bernoulli"),
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
        source: activations.
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
        self._covariance = cache(lambda: covariance_of(source))

    def sae(self, name: str, arm: Arm, preset: str, degree: int, seed: int, changes: Mapping[str, Any] = {}) -> SAE:
        """The arm's SAE, trained into ``out/name``; ``changes``: to the settings of its training.

        Raises:
            ValueError: there is no such mask at this size.
        """
        shared = {"preset": preset, "seed": seed, **self.sizes, **self.training[preset]}
        settings = {**shared, **changes, "degree": degree}
        if arm.mask != LEARNED:
            settings |= {"mask": arm.mask, "basis": arm.basis}
            start = build_sae(resolve(settings).sae, self.source, self._covariance)
        else:  # one dense SAE serves all degrees, so it does not share the changes
            dense = trained(self.dense_name(preset, seed), shared | {"dictionary": "dense"}, self.source, self.out)
            start = pruned(dense, degree)
        return trained(name, settings, self.source, self.out, start)

    @staticmethod
    def dense_name(preset: str, seed: int) -> str:
        """Folder of the dense SAE that learned supports are taken from."""
        return f"dense-{preset}-seed{seed}"


@dataclass(frozen=True)
class ArmsSettings:
    """Settings of an experiment that trains SAEs on some arms with one preset."""

    model: str = "embedded"
    """Language model whose activations are read."""
    tokens: int = 300_000
    """Activation vectors to train on."""
    masks: tuple[str, ...] = ("left-regular", "clustered", "learned", "reed-solomon")
    """Supports; the first three are the paper's."""
    degrees: tuple[int, ...] = (7, 30)
    """Rows each column uses."""
    preset: str = "paper-stable"
    """Preset of every training; `paper-stable` is the paper's with `b_dec` from the mean."""
    steps: int = 1500
    """Steps of every training; `learned` has as many more, of a dense SAE."""
    batch_size: int = 256
    """Activation vectors in each step."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of everything."""
    d_sae: int = 2304
    """Features of every SAE."""
    k: int = 32
    """Features per sample."""


class TrainedArms:
    """The SAEs of an experiment with one preset: every arm named in ``settings.masks``, degree and seed."""

    def __init__(self, subject: Subject, settings: ArmsSettings, out: Path) -> None:
        store = subject.activations(settings.tokens)
        self.settings, self.out, self.d_in = settings, out, store.d_in
        training = {settings.preset: {"steps": settings.steps, "batch_size": settings.batch_size}}
        self._supports = Supports(store, out, settings.d_sae, settings.k, training)

    def _why_not(self, name: str, degree: int) -> str | None:
        mask = arm_named(name).mask
        return None if mask == LEARNED else refusal(mask, self.d_in, self.settings.d_sae, degree)

    def runs(self) -> list[tuple[str, int, int]]:
        """Every ``(name, degree, seed)`` for which there are such supports."""
        names, degrees, seeds = self.settings.masks, self.settings.degrees, self.settings.seeds
        there = [(name, degree) for name in names for degree in degrees if self._why_not(name, degree) is None]
        return [(name, degree, seed) for name, degree in there for seed in seeds]

    def refused(self) -> list[str]:
        """What is not to be had, in a sentence, if anything."""
        asked = [(name, degree) for name in self.settings.masks for degree in self.settings.degrees]
        reasons = {f"{name} at d = {degree}": self._why_not(name, degree) for name, degree in asked}
        return not_to_be_had({name: why for name, why in reasons.items() if why is not None})

    def figures(self, compute: Callable[[SAE, int], dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Name, degree and seed of every run, and what ``compute`` finds of its SAE and seed: once, kept in cells.

        Masks and degrees may be added to a finished folder.
        """
        shared = without_seeds(self.settings)
        cells = Cells(self.out, {name: value for name, value in shared.items() if name not in ("masks", "degrees")})
        for name, degree, seed in self.runs():
            key = f"{name}-d{degree}-seed{seed}"

            def one(key: str = key, name: str = name, degree: int = degree, seed: int = seed) -> dict[str, Any]:
                sae = self._supports.sae(key, arm_named(name), self.settings.preset, degree, seed)
                return compute(sae, seed)

            found = cells.get(key, one, lambda key=key: sae_hash(self.out / key))
            yield {"name": name, "degree": degree, "seed": seed}, found


def mask_of(sae: SAE) -> Mask:
    """The mask of an SAE of this module. Raises ``TypeError`` for one that is not on a mask."""
    if not isinstance(sae.dictionary, ExpanderDictionary):
        raise TypeError(f"the SAE is not on a mask: its dictionary is {sae.dictionary.kind!r}")
    return sae.dictionary.mask


def arm_named(name: str) -> Arm:
    """The arm. Raises ``ValueError`` with the choices if there is none."""
    if name not in ARMS:
        raise ValueError(unknown("arm", name, ARMS))
    return ARMS[name]


def not_to_be_had(refused: Mapping[str, str]) -> list[str]:
    """A paragraph on masks that do not exist at a size, if there are some."""
    return ["Not to be had: " + "; ".join(f"{name}: {why}" for name, why in refused.items()) + "."] if refused else []


def published_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the paper's figures under its names for the SAEs, marked ``published``."""
    return [dict(row) | {"name": f"the paper's {MASKS[row['mask']]}", "published": True} for row in rows]
