"""The experiments: a record each, which their modules register and everything else is made from.

Adding one is adding a module to this package that calls :func:`register`. The commands of ``expander-sae reproduce``,
its list, ``docs/experiments.md`` and the smoke tests follow.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

from expander_sae.experiments.common.results import Finding, conclude
from expander_sae.experiments.common.settings import described, revised
from expander_sae.registry import Registry, unknown
from expander_sae.report.picture import Picture
from expander_sae.report.table import DASH, WIDEST, Column, markdown_table, text

Scale = Literal["smoke", "laptop", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)
MEANING: dict[Scale, str] = {
    "smoke": "does it run: seconds, figures without meaning",
    "laptop": "two cores and the embedded model: minutes",
    "paper": "the paper's sizes and model, for a GPU with the Hub",
}

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Experiment(Generic[Settings]):
    """One experiment.

    Attributes:
        name: of its command and its folder under ``runs``.
        question: what it answers, one sentence that ends in a question mark.
        sizes: its settings, a frozen dataclass with a docstring under every field, for each scale it has.
        run: does the work, resumably, in a folder.
        columns: of the table that is shown, at most :data:`~expander_sae.report.table.WIDEST`.
        picture: draws the rows.
        details: columns of a second table, in ``results.md`` only.
    """

    name: str
    question: str
    sizes: Mapping[Scale, Settings]
    run: Callable[[Settings, Path], Finding]
    columns: tuple[Column, ...]
    picture: Picture
    details: tuple[Column, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name) or not self.question.endswith("?"):
            raise ValueError(
                f"an experiment has a lower-case name and a question, got {self.name!r}, {self.question!r}"
            )
        for columns in (self.columns, self.details):
            if len(columns) > WIDEST:
                raise ValueError(f"{self.name}: a table has at most {WIDEST} columns, got {len(columns)}")

    @property
    def has_seeds(self) -> bool:
        """Whether it is run over several seeds, its setting ``seeds``."""
        return hasattr(next(iter(self.sizes.values())), "seeds")

    def settings(self, scale: str = "laptop", seeds: int | None = None, changes: Mapping[str, Any] = {}) -> Settings:
        """The settings of a scale.

        Args:
            scale: one of ``sizes``.
            seeds: run over seeds ``0`` to ``seeds - 1`` instead.
            changes: other values by name; ``"options.block"`` is a key of the setting ``options``.

        Raises:
            ValueError: unknown scale or setting, a value that does not fit, or ``seeds`` where there are none.
        """
        if scale not in self.sizes:
            raise ValueError(unknown(f"scale of {self.name}", scale, self.sizes))
        settings = revised(self.sizes[scale], changes)  # type: ignore[index]
        if seeds is None:
            return settings
        if not self.has_seeds or seeds < 1:
            raise ValueError(f"{self.name} cannot be run over {seeds} seeds")
        return replace(settings, seeds=tuple(range(seeds)))  # type: ignore[type-var]


REGISTRY: Registry[Experiment[Any]] = Registry("experiment")


def register(experiment: Experiment[Any]) -> Experiment[Any]:
    """Make an experiment known. Raises ``ValueError`` for a name that is taken or a scale that is missing."""
    missing = [scale for scale in SCALES if scale not in experiment.sizes]
    if missing:
        raise ValueError(f"the experiment {experiment.name!r} lacks the scale {', '.join(missing)}")
    return REGISTRY.add(experiment.name, experiment)


def discover() -> dict[str, Experiment[Any]]:
    """All experiments by name: imports every module beside this one, and with them torch."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package}.{module.name}")
    return dict(sorted(REGISTRY.items()))


def perform(
    experiment: Experiment[Settings], settings: Settings, out: str | Path | None = None, *, scale: str = "laptop"
) -> list[dict[str, Any]]:
    """Run an experiment, write its files, print its table; interrupted and run again, it continues.

    Args:
        experiment: what to run.
        settings: see :meth:`Experiment.settings`.
        out: the folder; by default :func:`folder_of`.
        scale: what is written over the result.

    Returns the rows of the table.
    """
    out = folder_of(experiment.name, scale) if out is None else Path(out)
    print(f"{experiment.name} ({scale}): {experiment.question} Results in {out}", file=sys.stderr)
    finding = experiment.run(settings, out)
    if scale != "laptop":
        finding = replace(finding, title=f"{finding.title} ({scale})")
    tables = [columns for columns in (experiment.columns, experiment.details) if columns]
    facts = {"experiment": experiment.name, "scale": scale, "size": asdict(settings)}  # type: ignore[call-overload]
    conclude(out, finding, tables, facts, experiment.picture, f"{experiment.name}.png")
    return finding.rows


def folder_of(name: str, scale: str) -> Path:
    """Where results go if nobody says otherwise."""
    return Path("runs") / (name if scale == "laptop" else f"{name}-{scale}")


LIST_COLUMNS = (Column("experiment", text("name")), Column("what it answers", text("question"), words=True))


def listed() -> list[dict[str, Any]]:
    """A row for each experiment, for :data:`LIST_COLUMNS`."""
    return [{"name": name, "question": experiment.question} for name, experiment in discover().items()]


def markdown() -> str:
    """``docs/experiments.md``, whole."""
    commands = (Column("command", lambda row: f"`expander-sae reproduce {row['name']}`"), LIST_COLUMNS[1])
    scales = [f"`--scale {scale}`: {MEANING[scale]}" for scale in SCALES]
    parts = [
        "# Experiments",
        "Written from the records in `src/expander_sae/experiments` by "
        "`python -m expander_sae.experiments > docs/experiments.md`; a test compares.",
        markdown_table(listed(), commands).rstrip(),
        "\n".join(f"- {line}" for line in scales),
        "Each continues after an interruption, does nothing twice, and writes `results.json` (everything), "
        "`results.md` (the tables) and a picture. `--set name=value` changes any setting below, `--seeds N` "
        "the number of seeds.",
    ]
    for name, experiment in discover().items():
        parts += [f"## {name}", experiment.question, _settings_table(experiment)]
    return "\n\n".join(parts) + "\n"


def _settings_table(experiment: Experiment[Any]) -> str:
    columns = [Column("setting", lambda row: f"`{row['name']}`")]
    columns += [Column(scale, text(scale)) for scale in SCALES]
    columns += [Column("meaning", text("meaning"), words=True)]
    return markdown_table(setting_rows(experiment), columns).rstrip()


def setting_rows(experiment: Experiment[Any]) -> Sequence[dict[str, str]]:
    """A row for each setting: ``name``, ``meaning``, and its value for every scale."""
    kind = type(next(iter(experiment.sizes.values())))
    return [
        {"name": name, "meaning": meaning}
        | {scale: _shown(getattr(settings, name)) for scale, settings in experiment.sizes.items()}
        for name, meaning in described(kind).items()
    ]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value)) or DASH
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(one)}" for key, one in value.items()) or DASH
    return DASH if value is None else f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)
