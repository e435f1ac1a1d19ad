"""The fixtures of the command tests that run a language model."""

from __future__ import annotations

from support.lm import hub

__all__ = ["hub"]
