"""The codes of one dictionary, surveyed: distributions of what holds token by token, and what predicts recovery."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from expander_sae.dictionary import Matrix
from expander_sae.ops import SparseCode
from expander_sae.stored import Section
from expander_sae.theory.on_codes import Measures, measure
from expander_sae.theory.planted import Recovery, auc, predictors, rank_correlation, recover, strongest

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NOISE_LEVELS = (0.0, 0.1, 0.3, 1.0)
"""Fractions of the measured residual norm at which codes are planted."""
SHARES = (8, 4, 2, 1)
"""Codes are planted whole and as their strongest half, quarter and eighth: measures tell most where some are found."""
_FEWEST = 5  # tokens on either side of an AUC; fewer say nothing


@dataclass(frozen=True)
class Planted:
    """OMP on planted codes of one size at one level of noise.

    Attributes:
        size: the most features of a code, its strongest.
        noise: fraction of each token's residual norm.
        erc_below_one: share of tokens on whose planted support OMP provably works without noise.
        guaranteed: share on which it provably does at this noise (docs/theory.md T15).
        exact: share of tokens whose support came back whole.
        share: mean share of the support that came back.
        auc: for each measure how well it tells, token by token, whether the support came back; ``None`` where
            fewer than five tokens are on one side.
        correlation: for each measure the rank correlation with the share that came back; ``None`` where constant.
    """

    size: int
    noise: float
    erc_below_one: float
    guaranteed: float
    exact: float
    share: float
    auc: Mapping[str, float | None]
    correlation: Mapping[str, float | None]


@dataclass(frozen=True)
class CodeSurvey:
    """What the codes of some activations are like under the conditions of the theorems.

    Attributes:
        tokens: codes looked at.
        source: where the activations come from.
        encoder: who made the codes.
        quantiles: for each measure its quantiles at :data:`QUANTILES`.
        planted: outcomes, by size of the code and then at :data:`NOISE_LEVELS`; the last is the whole code at the
            measured residual.
    """

    tokens: int
    source: str
    encoder: str
    quantiles: Mapping[str, tuple[float, ...]]
    planted: tuple[Planted, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON; infinity is null."""
        quantiles = {name: [_finite(value) for value in values] for name, values in self.quantiles.items()}
        return asdict(self) | {"quantiles": quantiles, "planted": [asdict(one) for one in self.planted]}

    @classmethod
    def from_section(cls, section: Section) -> Self:
        """Read :meth:`to_dict` back. Raises ``ValueError`` for an entry missing, of another type, or not known."""
        section.only(*cls.__dataclass_fields__)
        quantiles = section.section("quantiles")
        planted = section.entries.get("planted")
        if not isinstance(planted, list):
            raise ValueError(f"{section.name}.planted should be a list, it is {planted!r}")
        return cls(
            tokens=section.integer("tokens"),
            source=section.text("source"),
            encoder=section.text("encoder"),
            quantiles={name: _numbers(quantiles, name) for name in quantiles.entries},
            planted=tuple(_planted(Section(one, f"{section.name}.planted")) for one in planted),
        )


def survey(
    matrix: Matrix, code: SparseCode, noise: Tensor, *, source: str = "", encoder: str = "", seed: int = 0
) -> CodeSurvey:
    """Measure codes, plant them, and compare.

    Args:
        matrix: the dictionary.
        code: ``(B, k)``; a slot of value 0 is unused.
        noise: ``(B,)``, the residual norms of the tokens, in the units of the activations.
        source, encoder: names to keep.
        seed: of the noise.

    Raises:
        ValueError: no code with an active feature.
    """
    active = (code.values != 0).any(dim=1)
    if not bool(active.any()):
        raise ValueError("none of these codes has an active feature: there is nothing to survey")
    code, noise = SparseCode(code.indices[active], code.values[active].detach()), noise[active].detach()
    measures = measure(matrix, code, noise)
    signal = matrix.decode(code).detach().double().norm(dim=1).cpu()
    shown = {
        "active features": measures.size.double(),
        "ERC": measures.erc,
        "σ_min": measures.sigma_min,
        "condition": measures.condition,
        "rows covered": measures.coverage,
        "collisions": measures.collisions,
        "residual / signal": noise.double().cpu() / signal,
        "coefficient / noise": measures.coefficient_to_noise,
        "coefficient / noise needed": measures.needed,
    }
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    planted = []
    for size in sorted({max(1, code.k // share) for share in SHARES}):
        part = code if size == code.k else strongest(matrix, code, size)
        of_part = measures if size == code.k else measure(matrix, part, noise)
        for level in NOISE_LEVELS:
            planted.append(_outcome(size, level, of_part, recover(matrix, part, level * noise, seed)))
    return CodeSurvey(
        tokens=len(noise),
        source=source,
        encoder=encoder,
        quantiles={
            name: tuple(values.quantile(at, interpolation="lower").tolist())
            for name, values in shown.items()
            if not bool(values.isnan().any())
        },
        planted=tuple(planted),
    )


def _outcome(size: int, level: float, measures: Measures, found: Recovery) -> Planted:
    few = min(int(found.exact.sum()), int((~found.exact).sum())) < _FEWEST
    telling = predictors(measures)
    safe = measures.coefficient_to_noise > level * measures.needed if level else measures.erc < 1
    return Planted(
        size,
        level,
        _mean(measures.erc < 1),
        _mean(safe),
        _mean(found.exact),
        _mean(found.share),
        {name: None if few else auc(values, found.exact) for name, values in telling.items()},
        {name: rank_correlation(values, found.share) for name, values in telling.items()},
    )


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _planted(section: Section) -> Planted:
    section.only(*Planted.__dataclass_fields__)
    areas, related = section.section("auc"), section.section("correlation")
    return Planted(
        section.integer("size"),
        section.number("noise"),
        section.number("erc_below_one"),
        section.number("guaranteed"),
        section.number("exact"),
        section.number("share"),
        {name: None if areas.entries[name] is None else areas.number(name) for name in areas.entries},
        {name: None if related.entries[name] is None else related.number(name) for name in related.entries},
    )


def _numbers(section: Section, key: str) -> tuple[float, ...]:
    values = section.entries[key]
    if not isinstance(values, list) or len(values) != len(QUANTILES):
        raise ValueError(f"{section.name}.{key} should be {len(QUANTILES)} numbers, it is {values!r}")
    named = Section({str(place): value for place, value in enumerate(values)}, f"{section.name}.{key}")
    return tuple(math.inf if value is None else named.number(str(place)) for place, value in enumerate(values))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
