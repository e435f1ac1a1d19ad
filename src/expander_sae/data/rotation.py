"""Activations in another orthonormal basis: the rows of a source, rotated."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from expander_sae.data.sources import ActivationSource, RowIndex

_TOLERANCE = 1e-4  # of QᵀQ - I: float32 rounding of an orthogonal matrix of some thousand rows stays far below


class RotatedSource(ActivationSource):
    """The rows ``h`` of a source as ``h Q``: their coordinates in the basis that the columns of ``Q`` are.

    Args:
        source: activations of width ``m``.
        rotation: ``Q (m, m)``, orthogonal.

    Raises:
        ValueError: another shape, or a matrix that is not orthogonal.
    """

    def __init__(self, source: ActivationSource, rotation: Tensor) -> None:
        check_rotation(rotation, source.d_in)
        self._source, self._rotation = source, rotation

    @property
    def d_in(self) -> int:
        return self._source.d_in

    def __len__(self) -> int:
        return len(self._source)

    def rows(self, index: RowIndex) -> Tensor:
        return rotated(self._source.rows(index), self._rotation)

    def origin(self) -> dict[str, Any]:
        """What an SAE trained on these rows records of them: the source's origin, and a hash of the rotation."""
        known = getattr(self._source, "origin", None)
        origin = dict(known()) if known is not None else {"d_in": self.d_in, "rows": len(self)}
        digest = hashlib.sha256(self._rotation.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        return origin | {"rotation_sha256": digest}


def rotated(h: Tensor, rotation: Tensor) -> Tensor:
    """``h Q`` for ``h (..., m)``, computed in the type of ``rotation`` and returned in it."""
    return h.to(rotation) @ rotation


def check_rotation(rotation: Tensor, d_in: int) -> None:
    """Raise ``ValueError`` unless ``rotation`` is orthogonal, ``(d_in, d_in)``."""
    if rotation.shape != (d_in, d_in):
        raise ValueError(f"a rotation of width-{d_in} activations has shape ({d_in}, {d_in}), got {rotation.shape}")
    off = float((rotation.double().T @ rotation.double() - torch.eye(d_in, device=rotation.device)).abs().max())
    if not off <= _TOLERANCE:
        raise ValueError(f"the rotation is not orthogonal: QᵀQ is off the identity by {off:.2g}")


def random_rotation(d_in: int, seed: int) -> Tensor:
    """An orthogonal matrix uniform by the Haar measure, float32 ``(d_in, d_in)`` (Mezzadri 2007)."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()  # without the signs, QR does not draw uniformly


def principal_axes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The principal axes of a sample of activations ``(N, m)``.

    Returns:
        The axes as columns, float32 ``(m, m)``, by falling variance; and those variances, float64 ``(m,)``.
    """
    centred = rows.double() - rows.double().mean(dim=0)
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(rows))
    return axes.flip(1).float(), variances.flip(0).clamp_min(0)
