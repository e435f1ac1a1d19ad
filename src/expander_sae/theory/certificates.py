"""Certificates: what is guaranteed for one dictionary, for which ``k``, and how far its own ``k`` is from that.

A certificate names the dictionary by a hash of supports and values. After training on it is of another dictionary, and
:func:`is_of` says so.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Self

import torch

from expander_sae.dictionary import Dictionary, ExpanderMatrix, Matrix
from expander_sae.mask import Mask
from expander_sae.stored import Section
from expander_sae.theory.coherence import (
    Coherence,
    Number,
    below_one,
    coherence,
    flatness,
    squared_flatness,
)
from expander_sae.theory.expansion import expansion_deficits
from expander_sae.theory.graph import refuse_irregular
from expander_sae.theory.survey import QUANTILES, CodeSurvey

KIND = "expansion-coherence"
VERSION = 1

Ends = tuple[Number, Number]
"""The lower and the upper end of a bracket."""


@dataclass(frozen=True)
class Certificate:
    """What was computed. Everything else is derived by its methods.

    Attributes:
        sha256: of the dictionary (:func:`dictionary_sha256`), or of the mask.
        d_in, d_sae: sizes.
        k: active features at which the dictionary is used.
        coherence: ``μ₁``, exact.
        degree: rows of each column; ``None`` where there is no expansion part.
        beta_squared: ``β²``; ``None`` likewise.
        flatness: quantiles of ``β_j`` at :data:`~expander_sae.theory.survey.QUANTILES`; ``None`` likewise.
        found: collisions of the worst set of 1, 2, … columns that was found (docs/theory.md D2).
        bound: collisions that no set of 1, 2, … columns exceeds.
        bounded_by: which bound that is, for each size.
        refused: why there is no expansion part.
        codes: what holds token by token on codes, if some were given.
    """

    sha256: str
    d_in: int
    d_sae: int
    k: int
    coherence: Coherence
    degree: int | None = None
    beta_squared: Number | None = None
    flatness: tuple[float, ...] | None = None
    found: tuple[int, ...] = ()
    bound: tuple[int, ...] = ()
    bounded_by: tuple[str, ...] = ()
    refused: str | None = None
    codes: CodeSurvey | None = None

    def deficit(self, s: int) -> tuple[Fraction, Fraction] | None:
        """Both ends of ``ε_s``, equal where it is exact; ``None`` where it is not known."""
        if self.degree is None or not 1 <= s <= len(self.found):
            return None
        entries = self.degree * s
        return Fraction(self.found[s - 1], entries), Fraction(self.bound[s - 1], entries)

    def expansion(self, largest: int) -> tuple[Fraction, Fraction] | None:
        """Both ends of ``ε(K)``, the largest ``ε_s`` of ``s ≤ K``."""
        ends = [self.deficit(s) for s in range(1, largest + 1)]
        known = [one for one in ends if one is not None]
        if not known or len(known) < len(ends):
            return None
        return max(lower for lower, _ in known), max(upper for _, upper in known)

    def r_id(self, k: int) -> Ends | None:
        """``R_id = 2β²·ε(2k)``, both ends (docs/theory.md T8). Sets have at most ``d_sae`` columns."""
        eps = self.expansion(min(2 * k, self.d_sae))
        if eps is None or self.beta_squared is None:
            return None
        return 2 * self.beta_squared * eps[0], 2 * self.beta_squared * eps[1]

    def r_omp(self, k: int) -> Ends | None:
        """``R_OMP = β²·ε(k+1)·(2k+1)``, both ends (docs/theory.md T10)."""
        eps = self.expansion(min(k + 1, self.d_sae))
        if eps is None or self.beta_squared is None:
            return None
        return self.beta_squared * eps[0] * (2 * k + 1), self.beta_squared * eps[1] * (2 * k + 1)

    @property
    def omp_level(self) -> int:
        """The largest ``k`` at which OMP and basis pursuit recover every code, by ``μ₁`` or by ``R_OMP``."""
        return max(self.coherence.omp_level, self._paper_level(self.r_omp))

    @property
    def unique_level(self) -> int:
        """The largest ``k`` at which every code is the only one of its sparsity, by ``μ₁`` or by ``R_id``."""
        return max(self.coherence.unique_level, self._paper_level(self.r_id), self.omp_level)

    def stability_1(self, k: int) -> float:
        """``c`` in ``‖x - x'‖₁ ≤ c·(‖e‖₂ + η)`` (docs/theory.md T11); ∞ where nothing is guaranteed."""
        ends = self.r_id(k)
        if ends is None or self.degree is None or self.beta_squared is None or not below_one(ends[1]):
            return math.inf
        rows = min(self.d_in, 2 * k * self.degree)
        return math.sqrt(float(self.beta_squared) * rows / self.degree) / float(1 - ends[1])

    def stability_2(self, k: int) -> float:
        """``c`` in ``‖x - x'‖₂ ≤ c·(‖e‖₂ + η)``; ∞ likewise."""
        return self.coherence.stability(k)

    def to_dict(self) -> dict[str, Any]:
        """The section ``certificate`` of a config: JSON, fractions as ``"4/7"``."""
        expansion = None
        if self.degree is not None and self.beta_squared is not None and self.flatness is not None:
            expansion = {
                "degree": self.degree,
                "beta_squared": _to_json(self.beta_squared),
                "flatness": list(self.flatness),
                "found": list(self.found),
                "bound": list(self.bound),
                "bounded_by": list(self.bounded_by),
            }
        return {
            "kind": KIND,
            "version": VERSION,
            "sha256": self.sha256,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "k": self.k,
            "mu_1": [_to_json(value) for value in self.coherence.sums],
            "zero_columns": self.coherence.zero_columns,
            "expansion": expansion,
            "refused": self.refused,
            "codes": None if self.codes is None else self.codes.to_dict(),
        }

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> Self:
        """Read :meth:`to_dict` back.

        Raises:
            ValueError: another kind or version, or an entry that is missing, of another type, or not known.
        """
        whole = Section(entries, "certificate")
        if whole.text("kind") != KIND:
            raise ValueError(f"the certificate has kind {whole.text('kind')!r}, this program reads {KIND!r}")
        whole.version(VERSION)
        keys = ("sha256", "d_in", "d_sae", "k", "mu_1", "zero_columns", "expansion", "refused", "codes")
        whole.only("kind", "version", *keys)
        d_sae = whole.integer("d_sae")
        sums = tuple(_from_json(value, "certificate.mu_1") for value in _list(whole, "mu_1", (str, float)))
        known = cls(
            sha256=whole.text("sha256"),
            d_in=whole.integer("d_in"),
            d_sae=d_sae,
            k=whole.integer("k"),
            coherence=Coherence(sums, d_sae, whole.integer("zero_columns", 0)),
            refused=None if whole.entries.get("refused") is None else whole.text("refused"),
            codes=None if whole.entries.get("codes") is None else CodeSurvey.from_section(whole.section("codes")),
        )
        if whole.entries.get("expansion") is None:
            return known
        part = whole.section("expansion")
        part.only("degree", "beta_squared", "flatness", "found", "bound", "bounded_by")
        found, bound = (tuple(_list(part, name, int)) for name in ("found", "bound"))
        if len(found) != len(bound):
            raise ValueError(f"{part.name} has {len(found)} deficits from below and {len(bound)} from above")
        return replace(
            known,
            degree=part.integer("degree"),
            beta_squared=_from_json(part.entries.get("beta_squared"), f"{part.name}.beta_squared"),
            flatness=tuple(_list(part, "flatness", float)),
            found=found,
            bound=bound,
            bounded_by=tuple(_list(part, "bounded_by", str)),
        )

    def _paper_level(self, condition: Any) -> int:
        if self.coherence.zero_columns:
            return 0
        k = 0
        while (ends := condition(k + 1)) is not None and k < self.d_sae and below_one(ends[1]):
            k += 1
        return k


def certify(
    subject: Mask | Dictionary | Matrix, k: int, *, codes: CodeSurvey | None = None, **options: Any
) -> Certificate:
    """Certify a dictionary, or flat columns on a mask.

    Args:
        subject: a mask stands for columns of equal positive entries on it. Columns are normalised whatever their
            norms are. A dense dictionary, or a mask whose columns differ in degree, gets no expansion part.
        k: active features at which it is used: ``μ₁`` is computed up to ``2k``, ``ε`` likewise.
        codes: a survey to keep with it.
        options: of :func:`~expander_sae.theory.expansion.expansion_deficits`.

    Raises:
        ValueError: ``k`` outside ``[1, d_sae]``.
    """
    if isinstance(subject, Mask):
        entries = torch.ones(subject.rows.shape)
        entries = entries if subject.held is None else entries * subject.held
        matrix: Matrix = ExpanderMatrix(subject.rows, entries, subject.d_in)
        mask, sha256 = subject, subject.sha256
    else:
        matrix = subject.matrix().detach().core
        support, held = matrix.support, getattr(matrix, "held", None)
        mask = None if support is None else Mask.from_rows(support, matrix.d_in, held)
        sha256 = dictionary_sha256(subject)
    if not 1 <= k <= matrix.d_sae:
        raise ValueError(f"k must be in [1, {matrix.d_sae}], got {k}")
    largest = min(2 * k, matrix.d_sae)
    known = Certificate(sha256, matrix.d_in, matrix.d_sae, k, coherence(matrix, max(1, 2 * k)), codes=codes)
    if mask is None:
        return replace(known, refused="the dictionary is dense: expansion is a property of sparse columns")
    try:
        refuse_irregular(mask)
    except ValueError as error:
        return replace(known, refused=str(error))
    deficits = expansion_deficits(mask, largest, **options)
    beta = flatness(matrix)
    assert beta is not None
    quantiles = beta[~beta.isnan()].quantile(torch.tensor(QUANTILES, dtype=beta.dtype)) if len(beta) else beta
    return replace(
        known,
        degree=mask.degree,
        beta_squared=squared_flatness(matrix),
        flatness=tuple(quantiles.tolist()),
        found=tuple(one.found for one in deficits),
        bound=tuple(one.bound for one in deficits),
        bounded_by=tuple(min(one.bounds, key=one.bounds.__getitem__) for one in deficits),
    )


def dictionary_sha256(subject: Dictionary | Matrix) -> str:
    """Hex SHA-256 of what determines the columns: supports, values, how they are normalised."""
    if isinstance(subject, Dictionary):
        described, tensors = subject.config(), subject.stored_tensors()
    else:
        described = {"d_in": subject.d_in}
        tensors = {"values": subject.values.detach()}
        tensors |= {} if subject.support is None else {"rows": subject.support}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_of(certificate: dict[str, Any], dictionary: Dictionary) -> bool:
    """Whether a stored certificate is of this very dictionary; one of a kind not known here is taken to be."""
    return certificate.get("kind") != KIND or certificate.get("sha256") == dictionary_sha256(dictionary)


def without_codes(certificate: dict[str, Any]) -> dict[str, Any]:
    """A stored certificate without the survey of its codes: another encoder makes others."""
    return certificate | {"codes": None} if certificate.get("kind") == KIND else certificate


def _to_json(value: Number) -> float | str:
    return str(value) if isinstance(value, Fraction) else value


def _from_json(value: Any, name: str) -> Number:
    try:
        if isinstance(value, str):
            return Fraction(value)
        if isinstance(value, float) and math.isfinite(value):
            return value
    except (ValueError, ZeroDivisionError):
        pass
    raise ValueError(f"{name} should be a fraction such as '4/7' or a number with a point, it is {value!r}")


def _list(section: Section, key: str, kinds: type | tuple[type, ...]) -> list[Any]:
    value = section.entries.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(one, kinds) for one in value):
        raise ValueError(f"{section.name}.{key} should be a list of figures, it is {str(value)[:80]}")
    return value
