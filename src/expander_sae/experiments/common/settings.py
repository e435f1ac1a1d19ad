"""Settings of experiments: changed by name, explained by the docstrings under their fields."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from expander_sae.fields import field_texts
from expander_sae.registry import unknown

Settings = TypeVar("Settings")


def revised(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """``settings`` (a dataclass) with other values; ``{"options.block": 4}`` changes a key of a mapping.

    Raises:
        ValueError: an unknown name, or a value that does not fit its field.
    """
    hints = get_type_hints(type(settings))
    values: dict[str, Any] = {}
    for name, value in changes.items():
        head, _, key = name.partition(".")
        if head not in hints:
            raise ValueError(unknown("setting", head, hints))
        if key:
            value = dict(values.get(head, getattr(settings, head))) | {key: value}
        values[head] = fitted(head, hints[head], value)
    return replace(settings, **values)  # type: ignore[type-var]


def fitted(name: str, hint: Any, value: Any) -> Any:
    """``value``, as YAML reads it, in the type of a field. Raises ``ValueError`` if it does not fit."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        if value in inner:
            return value
        raise ValueError(f"{name} must be one of {', '.join(map(repr, inner))}, got {value!r}")
    if kind in (Union, types.UnionType):  # "float | None"
        return None if value is None else fitted(name, next(one for one in inner if one is not type(None)), value)
    if kind is tuple:
        if isinstance(value, str):  # "16, 32", as the help shows it; YAML reads a list in brackets only
            value = yaml.safe_load(f"[{value}]")
        return tuple(fitted(name, inner[0], one) for one in (value if isinstance(value, list | tuple) else [value]))
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError:
            pass
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{name} must be of type {getattr(kind, '__name__', kind)}, got {value!r}")


def described(kind: type) -> dict[str, str]:
    """What each field of a dataclass means, by name: the docstring under it, in one line, with the choices it has."""
    texts = field_texts(kind)
    missing = [one.name for one in fields(kind) if one.name not in texts]  # type: ignore[arg-type]
    if missing:
        raise ValueError(f"{kind.__name__}: no docstring under {', '.join(missing)}")
    for name, hint in get_type_hints(kind).items():
        if get_origin(hint) is Literal:
            texts[name] += f" One of: {', '.join(map(str, get_args(hint)))}."
    return texts
