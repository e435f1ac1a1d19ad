"""No time counts before the answers agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expander_sae.ops import SparseCode

ROUNDING = 1e-5  # relative; float32 sums in another order differ by less
_TIES = 0.01  # share of samples where a float tie may lead a pursuit another way
_ASTRAY = 0.02  # and by how much its residual may then differ


class WrongAnswer(AssertionError):
    """Two contenders disagree. The message says who and where."""


def same_topk(name: str, code: SparseCode, scores: Tensor, reference: SparseCode | None = None) -> str:
    """Check that ``code`` holds the largest of ``scores (B, n)`` and their values, up to rounding and ties.

    Args:
        name: whose code it is.
        code: ``(B, k)``, to check.
        scores: ``Wᵀh + b_enc``, computed another way.
        reference: a code to count equal supports against.

    Raises:
        WrongAnswer: a value is not the score, a feature is named twice, or a larger score was left out.
    """
    indices = code.indices.long()
    slack = ROUNDING * scores.abs().amax(dim=1, keepdim=True)
    at = scores.gather(1, indices)
    smallest = scores.topk(code.k).values[:, -1:]
    ordered = indices.sort(dim=1).values
    faults = {
        "values are not the scores": ~((code.values - at).abs() <= slack).all(dim=1),
        "a larger score was left out": ~(at >= smallest - slack).all(dim=1),
        "a feature is named twice": (ordered[:, 1:] == ordered[:, :-1]).any(dim=1),
    }
    for fault, samples in faults.items():
        if bool(samples.any()):
            first = int(samples.nonzero()[0])
            raise WrongAnswer(f"{name}: {fault} in {int(samples.sum())} of {len(at)} samples, first in sample {first}")
    if reference is None:
        return f"codes checked ({len(at)})"
    equal = int((ordered == reference.indices.long().sort(dim=1).values).all(dim=1).sum())
    ties = len(at) - equal
    return f"same codes, but for float ties in {ties} of {len(at)}" if ties else "same codes"


def same_number(name: str, value: float, expected: float, tolerance: float = ROUNDING) -> None:
    """Raise :class:`WrongAnswer` unless ``value`` is ``expected`` up to a relative ``tolerance``."""
    if not abs(value - expected) <= tolerance * abs(expected):
        raise WrongAnswer(f"{name}: {value:.8g}, expected {expected:.8g}")


def same_tensor(name: str, value: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Raise :class:`WrongAnswer` unless ``‖value - expected‖ ≤ tolerance · ‖expected‖``."""
    distance = float((value - expected).norm())
    if not distance <= tolerance * float(expected.norm()):
        raise WrongAnswer(f"{name}: differs by {distance:.3g}, its norm is {float(expected.norm()):.3g}")


def residuals(h: Tensor, dense: Tensor, supports: Tensor, values: Tensor) -> Tensor:
    """``‖h - Wx‖ / ‖h‖`` in float64: ``h (B, m)``, ``dense = Wᵀ (n, m)``, the code ``(B, k)``."""
    h = h.double()
    sums = torch.nn.functional.embedding_bag(supports.long(), dense, per_sample_weights=values.double(), mode="sum")
    return (h - sums).norm(dim=1) / h.norm(dim=1)


def same_pursuit(
    name: str, supports: Sequence[Tensor], relative: Sequence[Tensor], *, tolerance: float = ROUNDING
) -> str:
    """Check two pursuits: the same support or the same residual sample by sample, but for a few float ties.

    Args:
        name: whose answer it is.
        supports: ``(B, k)`` of both.
        relative: ``‖r‖/‖h‖ (B,)`` of both.
        tolerance: how far residuals of other supports may differ.

    Raises:
        WrongAnswer: more than a rare tie differs.
    """
    one, other = (support.long().sort(dim=1).values for support in supports)
    equal = (one == other).all(dim=1)
    gap = (relative[0] - relative[1]).abs()
    astray = ~(gap <= tolerance)
    count = len(equal)
    if int(astray.sum()) > max(1, _TIES * count) or not bool((gap <= _ASTRAY).all()):
        raise WrongAnswer(
            f"{name}: residuals differ by more than {tolerance:g} in {int(astray.sum())} of {count} samples, "
            f"by {float(gap.max()):.3g} at most"
        )
    return f"same support in {int(equal.sum())} of {count}, same residual in {count - int(astray.sum())}"
