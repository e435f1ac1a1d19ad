"""The fixtures of the language-model tests."""

from __future__ import annotations

from support.lm import any_lm, lm, tokenizer, tokens

__all__ = ["any_lm", "lm", "tokenizer", "tokens"]
