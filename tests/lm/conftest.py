"""The fixtures of the language-model tests."""

from __future__ import annotations

from support.lm import any_lm, hub, lm, tokenizer, tokens

__all__ = ["any_lm", "hub", "lm", "tokenizer", "tokens"]
