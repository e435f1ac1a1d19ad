"""Reading ahead: the same items in the same order, errors where they belong, a clean end."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from expander_sae.data import TensorSource, prefetch


def reading_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert reading_threads() == 0


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_same_items_in_the_same_order(depth: int) -> None:
    assert list(prefetch(range(100), depth)) == list(range(100))
    assert list(prefetch([], depth)) == []
    source = TensorSource(torch.randn(50, 3))
    ahead = prefetch(source.batches(8, seed=1, start_step=3), depth)
    for mine, theirs in zip(itertools.islice(ahead, 30), source.batches(8, seed=1, start_step=3), strict=False):
        assert torch.equal(mine, theirs)
    ahead.close()


@pytest.mark.parametrize("depth", [1, 3])
def test_it_stays_as_far_ahead_as_told(depth: int) -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    ahead = prefetch(items(), depth)
    assert not read  # the thread starts with the first item
    for consumed in (1, 2, 3):
        next(ahead)
        deadline = time.monotonic() + 30
        while len(read) < consumed + depth and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(read) == consumed + depth
    ahead.close()


@pytest.mark.parametrize("error", [ValueError("of the iterator"), KeyboardInterrupt()])
def test_an_error_comes_after_the_items_before_it(error: BaseException) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise error

    ahead = prefetch(items(), depth=5)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(type(error)) as caught:
        next(ahead)
    assert caught.value is error
    assert list(ahead) == []


def test_closing_ends_the_thread_and_closes_the_iterator() -> None:
    ended = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            ended.set()

    numbers = items()
    ahead = prefetch(numbers)
    assert next(ahead) == 0
    ahead.close()
    assert ended.is_set()
    assert list(numbers) == []
    assert reading_threads() == 0
    ahead = prefetch(items())
    next(ahead)
    assert reading_threads() == 1
    del ahead  # forgotten
    gc.collect()
    assert reading_threads() == 0
    prefetch(items()).close()  # never started


def test_an_error_of_the_consumer_ends_it() -> None:
    def consume() -> None:
        for item in prefetch(itertools.count()):
            if item == 2:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        consume()


def test_depth_is_checked_at_the_call() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        prefetch([], 0)
