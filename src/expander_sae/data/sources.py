"""Rows of activations to train on and evaluate, wherever they are, and the order they are read in."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch

_SAMPLE_STREAM = 2**64 - 1  # second Philox key of `sample`: no epoch ever has this number

_T = TypeVar("_T")

RowIndex = np.ndarray | Sequence[int] | slice


class ActivationSource(Protocol):
    """Rows of activations to train on or evaluate. Subclasses give ``d_in``, ``len`` and ``rows``."""

    @property
    def d_in(self) -> int: ...

    def __len__(self) -> int: ...

    def rows(self, index: RowIndex) -> torch.Tensor:
        """The rows at ``index`` (integers ``(b,)`` or a slice), ``(b, d_in)`` in the stored dtype; a copy."""
        ...

    def batches(self, batch_size: int, seed: int, start_step: int = 0) -> Iterator[torch.Tensor]:
        """Shuffled batches ``(batch_size, d_in)`` without end, from batch number ``start_step``.

        Each epoch is a permutation of its own, and its last partial batch is dropped. Batch ``i`` depends on
        ``(len, batch_size, seed, i)`` alone: the step number is all the state that a resumed training needs.

        Raises ``ValueError`` if ``batch_size`` exceeds the rows or a number is out of range.
        """
        n = len(self)
        if not 1 <= batch_size <= n:
            raise ValueError(f"batch_size must be from 1 to the number of rows, {n}, not {batch_size}")
        if start_step < 0:
            raise ValueError(f"start_step must not be negative (got {start_step})")
        _generator(seed, 0)  # refuses a bad seed
        return self._batches(batch_size, seed, start_step)  # a generator of its own: errors come at the call

    def _batches(self, batch_size: int, seed: int, step: int) -> Iterator[torch.Tensor]:
        epoch, batch = divmod(step, len(self) // batch_size)
        while True:
            order = _generator(seed, epoch).permutation(len(self))
            for start in range(batch * batch_size, len(self) - batch_size + 1, batch_size):
                yield self.rows(order[start : start + batch_size])
            epoch, batch = epoch + 1, 0

    def sample(self, n: int, seed: int) -> torch.Tensor:
        """``n`` distinct random rows ``(n, d_in)``, given by the seed. ``ValueError`` if there are fewer."""
        if not 1 <= n <= len(self):
            raise ValueError(f"n must be from 1 to the number of rows, {len(self)}, not {n}")
        return self.rows(_generator(seed, _SAMPLE_STREAM).choice(len(self), n, replace=False))


class TensorSource(ActivationSource):
    """Activations in memory: a floating, finite ``(N, d_in)`` tensor on any device.

    Raises ``TypeError`` for anything else than a floating-point tensor, ``ValueError`` for another shape, NaN
    or infinity.
    """

    def __init__(self, activations: torch.Tensor) -> None:
        if not isinstance(activations, torch.Tensor) or not activations.is_floating_point():
            kind = getattr(activations, "dtype", type(activations).__name__)
            raise TypeError(f"activations must be a floating-point tensor, not {kind}")
        if activations.ndim != 2 or 0 in activations.shape:
            raise ValueError(f"activations must have shape (rows, d_in), neither 0; got {tuple(activations.shape)}")
        if bad := count_not_finite(activations):
            raise ValueError(f"{bad} of {len(activations)} activation rows hold NaN or infinity")
        self._activations = activations.detach()

    @property
    def d_in(self) -> int:
        return self._activations.shape[1]

    def __len__(self) -> int:
        return self._activations.shape[0]

    def rows(self, index: RowIndex) -> torch.Tensor:
        where = torch.from_numpy(row_numbers(index, len(self)))
        return self._activations[where.to(self._activations.device)]


def prefetch(iterator: Iterable[_T], depth: int = 2) -> Generator[_T]:
    """The items of ``iterator`` in their order, read in a thread that stays at most ``depth`` items ahead.

    For batches whose reading waits for a disk while a training step computes. The thread starts with the first
    item and ends with the iterator, or after the item in progress when the generator is closed (or forgotten);
    closing waits for it. An exception of the iterator is raised here, after the items before it. Close it before
    a fork: threads do not go on in a child. ``ValueError`` unless ``depth`` is at least 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, not {depth}")
    return _prefetch(iterator, depth)  # a generator of its own: the error comes at the call


def _prefetch(iterator: Iterable[_T], depth: int) -> Generator[_T]:
    changed = threading.Condition()
    waiting: deque[_T] = deque()
    ended: list[BaseException | None] = []  # once it has ended: with what
    closed = False

    def read() -> None:
        error: BaseException | None = None
        try:
            for item in iterator:
                with changed:
                    waiting.append(item)
                    changed.notify_all()
                    changed.wait_for(lambda: closed or len(waiting) < depth)
                    if closed:
                        return
        except BaseException as caught:
            error = caught
        finally:
            if isinstance(iterator, Generator):
                iterator.close()  # in the thread that ran it
            with changed:
                ended.append(error)
                changed.notify_all()

    thread = threading.Thread(target=read, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or ended)
                if not waiting:
                    if ended[0] is not None:
                        raise ended[0]
                    return
                item = waiting.popleft()
                changed.notify_all()
            yield item
    finally:
        with changed:
            closed = True
            changed.notify_all()
        if threading.current_thread() is not thread:  # where the garbage collector may have closed it
            thread.join()


def row_numbers(index: RowIndex, n: int) -> np.ndarray:
    """``index`` as int64 ``(b,)``. ``IndexError`` outside ``[0, n)``, ``TypeError`` if not integers."""
    if isinstance(index, slice):
        return np.arange(*index.indices(n))
    numbers = np.asarray(index)
    if numbers.ndim != 1 or not (numbers.size == 0 or np.issubdtype(numbers.dtype, np.integer)):
        raise TypeError(f"an index must be integers of shape (b,), not {numbers.dtype} {numbers.shape}")
    if numbers.size and (numbers.min() < 0 or numbers.max() >= n):
        raise IndexError(f"rows {numbers.min()} to {numbers.max()} asked for, there are {n}, from 0")
    return numbers.astype(np.int64)


def _generator(seed: int, stream: int) -> np.random.Generator:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, not {seed}")
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


def count_not_finite(rows: torch.Tensor) -> int:
    """How many of the rows ``(b, m)`` hold NaN or infinity."""
    finite = torch.isfinite(rows)
    return 0 if finite.all() else int((~finite.all(dim=1)).sum())
