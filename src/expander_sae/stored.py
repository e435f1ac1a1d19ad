"""Reading what was stored: nested config sections and tensors, each checked by name before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from expander_sae.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
_MISSING = object()


class Section:
    """One section of a config: typed access to its entries.

    Args:
        entries: the JSON object.
        name: where it stands, as in ``"dictionary.mask"``; for errors.

    Raises:
        ValueError: here and in every method, with the name of the entry, what it is and what it should be.
    """

    def __init__(self, entries: Any, name: str) -> None:
        if not isinstance(entries, dict):
            raise ValueError(f"{name} should be a section, it is {entries!r}")
        self.entries: dict[str, Any] = entries
        self.name = name

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def section(self, key: str) -> Section:
        """The section inside this one."""
        return Section(self._entry(key), f"{self.name}.{key}")

    def integer(self, key: str, low: int = 1, high: int = 2**63 - 1) -> int:
        """An integer in ``[low, high]``."""
        value = self._entry(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._refuse(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._entry(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._refuse(key, value, "a finite number")
        return float(value)

    def boolean(self, key: str) -> bool:
        """``true`` or ``false``."""
        value = self._entry(key)
        return value if isinstance(value, bool) else self._refuse(key, value, "true or false")

    def text(self, key: str) -> str:
        """A string."""
        value = self._entry(key)
        return value if isinstance(value, str) else self._refuse(key, value, "a string")

    def mapping(self, key: str) -> dict[str, Any]:
        """A JSON object with free content."""
        value = self._entry(key)
        return value if isinstance(value, dict) else self._refuse(key, value, "an object")

    def kind(self, registry: Registry[T]) -> T:
        """What the registry has under this section's ``kind``, if its ``version`` is the section's.

        Entries of the registry have an attribute ``version``.
        """
        kind = self.text("kind")
        try:
            found = registry[kind]
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}; a newer expander-sae may know it") from None
        self.version(getattr(found, "version", 1))
        return found

    def version(self, known: int) -> None:
        """Refuse a ``version`` other than ``known``."""
        version = self.integer("version")
        if version != known:
            raise ValueError(f"{self.name} has version {version}, this program reads version {known}")

    def only(self, *keys: str) -> None:
        """Refuse entries that are not named: they would be lost, and a newer program gave them a meaning."""
        extra = sorted(self.entries.keys() - set(keys))
        if extra:
            raise ValueError(f"{self.name} has an entry {extra[0]!r} that this program does not know")

    def _entry(self, key: str) -> Any:
        value = self.entries.get(key, _MISSING)
        if value is _MISSING:
            raise ValueError(f"{self.name} lacks {key!r}")
        return value

    def _refuse(self, key: str, value: Any, expected: str) -> Any:
        raise ValueError(f"{self.name}.{key} should be {expected}, it is {value!r}")


def take_tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """The floating-point tensor ``name`` of that shape, finite throughout.

    Raises:
        ValueError: missing, of another shape or type, or holding NaN or infinity.
    """
    import torch

    if name not in tensors:
        raise ValueError(f"the tensor {name!r} is missing")
    tensor = tensors[name]
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16) or tensor.shape != shape:
        raise ValueError(
            f"the tensor {name!r} should be floating point of shape {shape}, it is {tensor.dtype} {tuple(tensor.shape)}"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"the tensor {name!r} holds NaN or infinity")
    return tensor.contiguous()
