"""A certificate in words and as rows of a table."""

from __future__ import annotations

import math
from typing import Any

from expander_sae.theory.certificates import Certificate, Ends
from expander_sae.theory.coherence import below_one
from expander_sae.theory.survey import Planted

_COLLAPSED = 0.999  # of √d: a column that is one entry but for rounding


def levels(certificate: Certificate) -> list[dict[str, Any]]:
    """For the ``k`` that matter, from 1 to the operating one, what the conditions come to."""
    top = certificate.k
    wanted = {1, 2, 3, certificate.omp_level, certificate.omp_level + 1, certificate.unique_level, top}
    rows = []
    for k in sorted(one for one in wanted if 1 <= one <= top):
        known = certificate.coherence
        rows.append({
            "k": k,
            "recovery": float(known.recovery(k)),
            "uniqueness": float(known.at(2 * k - 1)),
            "eps": certificate.expansion(min(2 * k, certificate.d_sae)),
            "r_id": certificate.r_id(k),
            "r_omp": certificate.r_omp(k),
            "noise": known.coefficient_to_noise(k),
        })  # fmt: skip
    return rows


def verdict(certificate: Certificate) -> str:
    """What is guaranteed, for which ``k``, and how far the operating ``k`` is from it: plain sentences."""
    return " ".join([*_worst_case(certificate), *_paper(certificate), *_on_codes(certificate)])


def one_line(certificate: Certificate) -> str:
    """The shortest true summary."""
    return (
        f"every code recovered up to k = {certificate.omp_level}, unique up to k = {certificate.unique_level}; "
        f"used at k = {certificate.k}"
    )


def _worst_case(certificate: Certificate) -> list[str]:
    if zero := certificate.coherence.zero_columns:
        return [
            f"Nothing is guaranteed: {zero:,} of {certificate.d_sae:,} columns are zero, so no code is the only one."
        ]
    omp, unique, k = certificate.omp_level, certificate.unique_level, certificate.k
    said = []
    if omp:
        features = "feature" if omp == 1 else "features"
        said.append(
            f"Guaranteed for every code of at most {omp} active {features}: OMP and basis pursuit recover it exactly, "
            "without noise."
        )
    else:
        said.append("Nothing is guaranteed, not even that OMP recovers every code of one active feature.")
    if unique > omp:
        said.append(f"A code of at most {unique} active features is the only one so sparse.")
    if omp >= k:
        said.append(f"The dictionary is used at k = {k}: within the guarantee, as far as codes are exactly sparse.")
    else:
        times = f", {k / omp:.3g} times that" if omp else ""
        said.append(f"The dictionary is used at k = {k}{times}: no worst-case theorem speaks of it there.")
    return said


def _paper(certificate: Certificate) -> list[str]:
    if certificate.refused:
        return [f"No expansion part: {certificate.refused}."]
    k = certificate.k
    said = []
    for name, ends in (("R_id", certificate.r_id(k)), ("R_OMP", certificate.r_omp(k))):
        if ends is not None:
            said.append(f"{name} at k = {k} is {shown_ends(ends)}, where a proof needs less than 1: {_judged(ends)}.")
    if certificate.flatness and certificate.degree and certificate.degree > 1:
        largest = math.sqrt(float(certificate.beta_squared or 0))
        if largest > _COLLAPSED * math.sqrt(certificate.degree):
            said.append(f"Some columns have collapsed to one entry (β = {largest:.2f} = √d).")
    return said


def _on_codes(certificate: Certificate) -> list[str]:
    codes = certificate.codes
    if codes is None:
        return []
    whole = codes.planted[-1]
    said = [
        f"On {codes.tokens:,} codes of {codes.source} (encoder {codes.encoder}): on {whole.erc_below_one:.1%} of the "
        f"supports OMP provably works without noise, on {whole.guaranteed:.1%} at the residual that is there."
    ]
    for planted in (one for one in codes.planted if one.size == whole.size and one.noise in (0, 1)):
        how = "without noise" if planted.noise == 0 else "under noise of the measured residual's norm"
        said.append(
            f"Planted {how}, OMP finds {planted.exact:.1%} of the supports whole and {planted.share:.1%} of their "
            f"features{_best(planted)}."
        )
    return said


def _best(planted: Planted) -> str:
    known = [(area, name) for name, area in planted.auc.items() if area is not None]
    return f"; {max(known)[1]} tells best which (AUC {max(known)[0]:.2f})" if known else ""


def _judged(ends: Ends) -> str:
    if below_one(ends[1]):
        return "it holds"
    return "it fails" if ends[0] >= 1 else "it is open, the upper end proves nothing and the lower refutes nothing"


def shown_ends(ends: Ends | None, spec: str = ".3g") -> str:
    """``low to high``, or one figure where both ends agree; a dash where there is none."""
    if ends is None:
        return "–"
    low, high = (format(float(end), spec) for end in ends)
    return low if low == high else f"{low} to {high}"
