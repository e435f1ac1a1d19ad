"""What is true of most masks drawn column by column: a union bound, in logarithms (docs/theory.md T3)."""

from __future__ import annotations

import math
from fractions import Fraction


def log_failure(d_in: int, d_sae: int, degree: int, s: int, eps: Fraction | float) -> float:
    """Logarithm of a bound on ``P(some |S| = s has |N(S)| ≤ (1-ε)·d·s)`` of a random mask; may exceed 0.

    Args:
        d_in, d_sae, degree: sizes; supports are drawn uniformly and independently.
        s: columns of a set.
        eps: ``ε`` in ``(0, 1)``.

    Raises:
        ValueError: ``eps`` out of range.
    """
    eps = Fraction(eps)
    if not 0 < eps < 1:
        raise ValueError(f"eps must lie in (0, 1), got {eps}")
    rows = math.floor((1 - eps) * degree * s)
    if rows < degree:
        return -math.inf  # a single column has `degree` rows
    if rows >= d_in:
        return 0.0
    held = _log_binomial(rows, degree) - _log_binomial(d_in, degree)
    return _log_binomial(d_sae, s) + _log_binomial(d_in, rows) + s * held


def ensemble_size(d_in: int, d_sae: int, degree: int, eps: Fraction | float, failure: float = 0.01) -> int:
    """The largest ``K`` such that a random mask is a ``(K, ε)``-expander but with probability ``failure``.

    More strictly, all sets have ``|N(S)| > (1-ε)·d·|S|``. A statement about the draw, not about one mask.

    Raises:
        ValueError: ``eps`` or ``failure`` outside ``(0, 1)``.
    """
    if not 0 < failure < 1:
        raise ValueError(f"failure is a probability in (0, 1), got {failure}")
    total, size = 0.0, 1
    while size < d_sae:
        total += math.exp(min(0.0, log_failure(d_in, d_sae, degree, size + 1, eps)))
        if total >= failure:
            break
        size += 1
    return size


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
