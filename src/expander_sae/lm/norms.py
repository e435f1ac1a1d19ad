"""The norm guard: which positions have so large a norm that they are left out of harvests and evaluations.

Attention sinks have 100 times the norm of other positions; a single one is nearly all of the variance of a batch. One
limit decides for the harvest and for every evaluation of what was trained on it: a multiple of the median norm over
the first 4,096 positions read, found once and written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from expander_sae.lm.hook import capture
from expander_sae.lm.identity import mismatches
from expander_sae.lm.models import LanguageModel
from expander_sae.lm.sites import Site

CALIBRATION_POSITIONS = 4096
DEFAULT_MULTIPLE = 10.0
_WINDOWS_AT_ONCE = 4

Multiple = float | None | Literal["recorded"]


@dataclass(frozen=True)
class NormGuard:
    """A limit on norms.

    Attributes:
        median: norm at the middle of the calibration positions.
        multiple: of the median; None for no limit.
        source: where the median comes from, for people: ``"recorded"``, ``"calibrated on the evaluation text"``.
    """

    median: float
    multiple: float | None
    source: str = "calibrated"

    @property
    def limit(self) -> float | None:
        """Norms above it are too large; None: none are."""
        return None if self.multiple is None else self.multiple * self.median

    def too_large(self, h: Tensor) -> Tensor:
        """Which vectors of ``h (..., m)`` are: bool ``(...)``."""
        norms = h.float().norm(dim=-1)
        return torch.zeros_like(norms, dtype=torch.bool) if self.limit is None else norms > self.limit


def check_multiple(multiple: float | None) -> float | None:
    """``multiple``, infinity as None. ``ValueError`` for what is no multiple above 1."""
    if multiple is not None and not multiple > 1:
        raise ValueError(f"max_norm_multiple must be above 1 (or None for no limit), not {multiple}")
    return None if multiple == float("inf") else multiple


def windows_to_calibrate(window: int) -> int:
    """How many windows of that many tokens hold the calibration positions."""
    return -(-CALIBRATION_POSITIONS // window)


def median_norms(
    lm: LanguageModel,
    windows: Sequence[Tensor],
    sites: Sequence[Site],
    counted: Callable[[Tensor], Tensor],
    windows_at_once: int = _WINDOWS_AT_ONCE,
) -> dict[Site, float]:
    """The median norm at each site over all positions of ``windows`` (``(T,)`` each) that ``counted`` leaves.

    ``counted``: of tokens ``(B, T)``, which positions count, bool ``(B, T)``. NaN where an activation holds NaN.
    Raises ``ValueError`` if no position counts, and as ``capture`` does.
    """
    norms: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for start in range(0, len(windows), windows_at_once):
        tokens = torch.stack(list(windows[start : start + windows_at_once]))
        keep = counted(tokens).cpu()
        for site, hidden in capture(lm, tokens, sites).items():
            norms[site].append(hidden.float().norm(dim=2).cpu()[keep])
    found = {site: torch.cat(parts) for site, parts in norms.items()}
    if not all(len(values) for values in found.values()):
        raise ValueError("no position is left to take the median norm of: all are skipped or special tokens")
    return {site: float(values.median()) for site, values in found.items()}


def guard_for_evaluation(
    origins: Iterable[Mapping[str, Any]],
    lm: LanguageModel,
    windows: Sequence[Tensor],
    site: Site,
    multiple: Multiple,
    counted: Callable[[Tensor], Tensor],
) -> NormGuard:
    """The limit for an evaluation of SAEs trained on ``origins``.

    The median is the one they record of this very model and site; where they record none, or several, that of the
    first 4,096 positions of the windows, whatever batches these are run in. ``multiple``: ``"recorded"`` is the one
    they record, 10 if there is none; a number or None (no limit) overrides it.
    """
    known = [origin for origin in origins if origin]
    if multiple == "recorded":
        recorded = {origin["max_norm_multiple"] for origin in known if "max_norm_multiple" in origin}
        chosen = recorded.pop() if len(recorded) == 1 else DEFAULT_MULTIPLE
    else:
        chosen = check_multiple(multiple)
    if chosen is None:
        return NormGuard(float("nan"), None, "no limit")
    # Another model's or place's median says nothing here.
    medians = {o.get("norm_median") for o in known if not mismatches(o, lm, site.layer, site.hook)}
    if len(medians) == 1 and (median := medians.pop()) is not None:
        return NormGuard(float(median), chosen, "recorded")
    first = windows[: windows_to_calibrate(windows[0].shape[0])]
    median = median_norms(lm, first, [site], counted)[site]
    return NormGuard(median, chosen, "calibrated on the evaluation text")
