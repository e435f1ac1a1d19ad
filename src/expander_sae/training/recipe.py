"""Recipes: presets, config files and flags, resolved into one SAE and one training configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from expander_sae.sae import ENCODERS, SAEConfig
from expander_sae.training.trainer import TrainConfig

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
        "batch_size": 1024,
        "lr": 2e-2,
        "lr_final": 0.0,
        "warmup_steps": 50,
    },
}
"""Named sets of values; what each field does is written at the field (:class:`SAEConfig`, :class:`TrainConfig`)."""

_SECTIONS = (SAEConfig, TrainConfig)
FIELDS: dict[str, type] = {name: hint for section in _SECTIONS for name, hint in get_type_hints(section).items()}


@dataclass(frozen=True)
class Recipe:
    """Everything a training run depends on beside its activations."""

    preset: str
    sae: SAEConfig
    train: TrainConfig

    def to_dict(self) -> dict[str, Any]:
        """Flat, as a config file has it."""
        return {"preset": self.preset} | asdict(self.train) | asdict(self.sae)


def resolve(*layers: Mapping[str, Any], default_preset: str = "modern") -> Recipe:
    """Merge flat mappings, later ones winning, over the preset that the last of them names.

    Raises:
        ValueError: an unknown preset or field, or a value that does not fit its field.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    preset = merged.pop("preset", default_preset)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(map(repr, PRESETS))}")
    unknown = sorted(map(repr, merged.keys() - FIELDS.keys()))
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}; the settings are {', '.join(sorted(FIELDS))}")
    given = {name: _fit(name, value) for name, value in merged.items()}
    values = _preset(preset, given) | given
    sections = [
        section(**{f.name: values[f.name] for f in fields(section) if f.name in values}) for section in _SECTIONS
    ]
    return Recipe(preset, *sections)  # type: ignore[arg-type]


def _preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's values, without those that what was ``given`` has no use for."""
    values, dropped = PRESETS[name], set()
    encoder = given.get("encoder", "tied")
    if encoder in ENCODERS and not ENCODERS[encoder].ranks_features:
        dropped = {"aux_k", "sparsity_options"}
    elif given.get("sparsity", "topk") != values.get("sparsity", "topk"):
        dropped = {"sparsity_options"}
    return {key: value for key, value in values.items() if key not in dropped}


def read_config(path: str | Path) -> dict[str, Any]:
    """A YAML or JSON file of flat settings.

    Raises:
        ValueError: unreadable, or not a mapping.
    """
    path = Path(path)
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
