"""Recipes: presets, config files and flags, resolved into one SAE and one training configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from expander_sae import files
from expander_sae.fields import field_texts
from expander_sae.mask import CONSTRUCTIONS
from expander_sae.registry import unknown
from expander_sae.sae import ENCODERS, SPARSITIES, SAEConfig
from expander_sae.training.config import TrainConfig

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},  # the defaults are the paper's
    "modern": {
        "sparsity_options": {"relu": True},
        "b_dec_init": "mean",
        "scale_activations": True,
        "resample_every": 0,
        "aux_k": 256,
        "batch_size": 1024,
        "lr": 1e-2,
        "lr_final": 0.0,
        "warmup_steps": 50,
    },
    "pursuit": {
        "encoder": "matching-pursuit",
        "b_dec_init": "mean",
        "scale_activations": True,
        "resample_every": 250,
        "resample_norm": "unit",
        "batch_size": 1024,
        "lr": 2e-2,
        "lr_final": 0.0,
        "warmup_steps": 50,
    },
}
_MODERN = {name: value for name, value in PRESETS["modern"].items() if name != "sparsity_options"}
PRESETS["multi-topk"] = PRESETS["modern"] | {"multi_topk": 4}
PRESETS |= {rule: _MODERN | {"sparsity": rule} for rule in ("batch-topk", "relu-l1", "jumprelu", "gated")}
PRESETS["pursuit-nonneg"] = PRESETS["pursuit"] | {"encoder_options": {"nonnegative": True}}
PRESETS["paper-stable"] = PRESETS["paper"] | {"b_dec_init": "mean"}
"""Named sets of values; what each field does is written at the field (:class:`SAEConfig`, :class:`TrainConfig`)."""

PRESET_NOTES = {
    "paper": "the paper's recipe to the letter; with uncentred activations and few rows per column it may diverge",
    "modern": "TopK with a ReLU and AuxK on centred, scaled activations (the default)",
    "multi-topk": "`modern` with the error at `4 k` features beside the one at `k`: codes may be made wider later",
    "batch-topk": "`modern` with `k` features per sample on average: the best of the whole batch",
    "relu-l1": "`modern` with all positive scores under an L1 penalty, adapted until `k` are left on average",
    "jumprelu": "`modern` with a learned threshold for each feature and an L0 penalty, adapted likewise",
    "gated": "`modern` with one path that decides which features are active and one how much, L1 adapted likewise",
    "pursuit": "trained and read by matching pursuit: the best reconstruction; half of its code values are negative",
    "pursuit-nonneg": "the same with positive code values only",
    "paper-stable": "the paper's recipe from `b_dec_init: mean`: the way to train it on any model",
}
"""What each preset is, in a line."""

FROM = "from"
"""Key of a recipe for the SAE that training starts from."""
_SECTIONS = (SAEConfig, TrainConfig)
FIELDS: dict[str, type] = {name: hint for section in _SECTIONS for name, hint in get_type_hints(section).items()}
SAE_FIELDS = frozenset(field.name for field in fields(SAEConfig)) - {"seed"}
"""Settings that an SAE to start from has decided."""
_CHOICES = {"encoder": ENCODERS, "mask": CONSTRUCTIONS, "sparsity": SPARSITIES}


@dataclass(frozen=True)
class Recipe:
    """Everything a training run depends on beside its activations.

    Attributes:
        preset: name of the preset.
        sae: which SAE to build; without meaning if there is a ``start``.
        train: what the loop does.
        start: folder, Hub id or checkpoint of the SAE that is trained further.
    """

    preset: str
    sae: SAEConfig
    train: TrainConfig
    start: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Flat, as a config file has it."""
        if self.start is not None:
            return {"preset": self.preset, FROM: self.start} | asdict(self.train)
        return {"preset": self.preset} | asdict(self.train) | asdict(self.sae)

    def to_yaml(self) -> str:
        """As a config file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def resolve(*layers: Mapping[str, Any], default_preset: str = "modern") -> Recipe:
    """Merge flat mappings, later ones winning, over the preset that the last of them names.

    What a preset says of AuxK, of Multi-TopK and of the options of a sparsity rule or a pursuit yields to a choice of
    encoder or rule that has none of it; resampling then takes the place of AuxK.

    Raises:
        ValueError: an unknown preset or field, or a value that does not fit its field.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    preset, start = merged.pop("preset", default_preset), merged.pop(FROM, None)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(unknown("preset", preset, PRESETS))
    if start is not None and not isinstance(start, str):
        raise ValueError(f"{FROM} must be a folder, a Hub id or a checkpoint, got {start!r}")
    if wrong := sorted(merged.keys() - FIELDS.keys(), key=repr):
        named = ", ".join(repr(name) + _hint(name) for name in wrong)
        raise ValueError(f"unknown setting {named}; the settings are {', '.join(sorted(FIELDS))}")
    given = {name: _fit(name, value) for name, value in merged.items()}
    values = _preset(preset, given) | given
    sae, loop = (
        section(**{f.name: values[f.name] for f in fields(section) if f.name in values}) for section in _SECTIONS
    )
    return Recipe(preset, sae, loop, start)  # type: ignore[arg-type]


def _hint(name: Any) -> str:
    near = get_close_matches(str(name), FIELDS, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's values, without those that what was ``given`` has no use for."""
    values = dict(PRESETS[name])
    encoder, sparsity = (
        given.get(key, values.get(key, default)) for key, default in (("encoder", "tied"), ("sparsity", "topk"))
    )
    ranks = encoder not in ENCODERS or ENCODERS[encoder].ranks_features  # an unknown one is refused elsewhere
    if not ranks and values.get("aux_k"):
        del values["aux_k"]
        values |= {key: PRESETS["pursuit"][key] for key in ("resample_every", "resample_norm")}
    if not ranks or sparsity != PRESETS[name].get("sparsity", "topk"):
        for key in ("sparsity_options", "multi_topk"):
            values.pop(key, None)
    if ranks:
        values.pop("encoder_options", None)
    return values


def read_config(path: str | Path) -> dict[str, Any]:
    """A YAML or JSON file of flat settings.

    Raises:
        ValueError: unreadable, or not a mapping.
    """
    path = files.user_path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"the config file {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the config file {path} is neither YAML nor JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"the config file {path} must hold `name: value` pairs, it holds a {type(values).__name__}")
    return values


def parse_settings(assignments: list[str]) -> dict[str, Any]:
    """``["lr=1e-3", "steps=200"]`` to a mapping; values are read as YAML.

    Raises:
        ValueError: not of the form ``name=value``, or a value that is no YAML.
    """
    settings = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"expected name=value, got {assignment!r}")
        try:
            settings[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"the value of {assignment!r} cannot be read as YAML; put text in quotes") from None
    return settings


def _fit(name: str, value: Any) -> Any:
    """``value`` as the field's type; YAML reads ``1e-3`` as a string and ``1`` as an integer."""
    hint = FIELDS[name]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if choices:
        if value in choices:
            return value
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    if get_origin(hint) is dict:
        if isinstance(value, dict):
            return value
        raise ValueError(f"{name} must be a mapping such as {{block: 8}}, got {value!r}")
    if hint in (bool, str):
        if isinstance(value, hint):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise ValueError(f"{name} must be of type {hint.__name__}, got {value!r}")


class Setting(NamedTuple):
    """One setting, as its field documents it."""

    section: str
    """``SAE`` or ``training``."""
    name: str
    type: str
    default: str
    """As YAML."""
    choices: tuple[str, ...]
    """Names it may have; empty if it is not a name."""
    text: str
    """What it does, one paragraph."""


def settings_reference() -> list[Setting]:
    """All settings of config files and ``--set``, from the fields of SAEConfig and TrainConfig and their docstrings."""
    found = []
    for section, title in ((SAEConfig, "SAE"), (TrainConfig, "training")):
        made, texts = section(), field_texts(section)
        for field in fields(section):
            if title == "training" and field.name == "seed":  # one setting, two fields
                continue
            hint, value = FIELDS[field.name], getattr(made, field.name)
            choices = get_args(hint) if get_origin(hint) is Literal else tuple(_CHOICES.get(field.name, ()))
            kind = "name" if choices else "mapping" if get_origin(hint) is dict else hint.__name__
            default = json.dumps(value) if not isinstance(value, str) else value
            found.append(Setting(title, field.name, kind, default, choices, texts[field.name]))
    return found


def settings_markdown() -> str:
    """:func:`settings_reference` and the presets as Markdown."""
    lines = ["| preset | what it is | its settings |", "|---|---|---|"]
    for name, note in PRESET_NOTES.items():
        values = ", ".join(f"`{key}: {_flow(value)}`" for key, value in PRESETS[name].items()) or "the defaults"
        lines.append(f"| `{name}` | {note} | {values} |")
    for title in ("SAE", "training"):
        lines += [
            "",
            f"## {title[0].upper()}{title[1:]}",
            "",
            "| setting | type | default | what it does |",
            "|---|---|---|---|",
        ]
        for setting in settings_reference():
            if setting.section == title:
                text = setting.text.replace("``", "`").replace("|", "\\|")
                lines.append(f"| `{setting.name}` | {setting.type} | `{setting.default}` | {text} |")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()
