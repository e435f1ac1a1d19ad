"""The random draws of masks: part of the file format, because stored SAEs keep the recipe and not the mask.

Raw 64-bit words come from the counter-based generator Philox4x64-10 (Salmon et al., SC 2011); the bounded draw is our
own. Library shuffles may change between versions and are not used. All arithmetic is on integers.
"""

from __future__ import annotations

import numpy as np


def words(seed: int, stream: int, count: int) -> np.ndarray:
    """``count`` raw uint64 words of one stream of Philox4x64-10 (key = seed, stream)."""
    return np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(count)


def bounded(raw: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """``floor(word * bound / 2**64)``: uniform on ``[0, bound)`` up to ``bound / 2**64``. ``bound < 2**31``."""
    high, low, limit = raw >> np.uint64(32), raw & np.uint64(0xFFFFFFFF), np.asarray(bound, dtype=np.uint64)
    return (high * limit + (low * limit >> np.uint64(32))) >> np.uint64(32)


def permutation(seed: int, stream: int, count: int) -> np.ndarray:
    """int32 ``(count,)``: the order that sorts the stream's words, equals (2⁻⁶⁴ likely) by position."""
    return np.argsort(words(seed, stream, count), kind="stable").astype(np.int32)


def dealt(seed: int, first_stream: int, kinds: int, count: int) -> np.ndarray:
    """int32 ``(count,)`` in ``[0, kinds)``: cards from shuffled decks, deck ``i`` from stream ``first_stream + i``.

    Each number appears ``count / kinds`` times, rounded up or down.
    """
    decks = [permutation(seed, first_stream + deck, kinds) for deck in range(-(-count // kinds))]
    return np.concatenate(decks)[:count]
