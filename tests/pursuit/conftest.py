"""The fixtures of the pursuit tests."""

from __future__ import annotations

from support.pursuit import make_matrix, matrix

__all__ = ["make_matrix", "matrix"]
