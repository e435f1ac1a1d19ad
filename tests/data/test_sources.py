"""Sources of activations: the order of batches, samples, what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stores import (
    everything,
    numbered,
    take,
)

from expander_sae.data import (
    ActivationStore,
    TensorSource,
)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 40),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**63),
    start=st.integers(0, 60),
)
def test_a_batch_depends_on_its_step_alone(rows: int, batch_size: int, seed: int, start: int) -> None:
    source, batch_size = numbered(rows), min(batch_size, rows)
    from_zero = take(source, start + 5, batch_size, seed)
    resumed = take(source, 5, batch_size, seed, start)
    assert all(torch.equal(a, b) for a, b in zip(from_zero[start:], resumed, strict=True))
    per_epoch = rows // batch_size
    for epoch in range(len(from_zero) // per_epoch):
        seen = torch.cat(from_zero[epoch * per_epoch : (epoch + 1) * per_epoch]).flatten().tolist()
        assert len(set(seen)) == len(seen) == per_epoch * batch_size
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)
        assert seen == order[: len(seen)].tolist()


def test_batches_of_a_store_and_of_a_tensor_are_the_same(folder: Path) -> None:
    store, source = ActivationStore.open(folder), TensorSource(everything().bfloat16())
    for mine, theirs in zip(take(store, 12, 16, 3), take(source, 12, 16, 3), strict=True):
        assert (mine.shape, mine.dtype) == ((16, 6), torch.bfloat16)
        assert torch.equal(mine, theirs)
    assert torch.equal(store.sample(20, 1), source.sample(20, 1))


def test_seeds_and_epochs_differ() -> None:
    source = numbered(1000)
    epochs = take(source, 3, 1000, 0) + take(source, 1, 1000, 1) + [source.sample(1000, 0)]
    for a, b in itertools.combinations(epochs, 2):
        assert (a == b).float().mean() < 0.02
        assert torch.equal(a.sort(dim=0).values, b.sort(dim=0).values)


def test_sample_is_distinct_and_repeatable() -> None:
    source = numbered(50)
    sample = source.sample(30, 7)
    assert len(sample.unique()) == 30
    assert torch.equal(sample, source.sample(30, 7))
    assert not torch.equal(sample, source.sample(30, 8))
    generator = np.random.Generator(np.random.Philox(key=np.array([7, 2**64 - 1], dtype=np.uint64)))
    assert sample.flatten().tolist() == generator.choice(50, 30, replace=False).tolist()  # no epoch's stream


def test_batches_and_sample_refuse_at_the_call() -> None:
    source = numbered(5)
    for batch_size in (0, 6):
        with pytest.raises(ValueError, match=f"batch_size must be from 1 to the number of rows, 5, not {batch_size}"):
            source.batches(batch_size, seed=0)
        with pytest.raises(ValueError, match=f"number of rows, 5, not {batch_size}"):
            source.sample(batch_size, seed=0)
    for seed in (-1, 2**64):
        for read in (source.batches, source.sample):
            with pytest.raises(ValueError, match=f"seed must be .* not {seed}"):
                read(2, seed=seed)
    with pytest.raises(ValueError, match="start_step"):
        source.batches(2, seed=0, start_step=-1)


def test_row_numbers_refused(folder: Path) -> None:
    for source in (ActivationStore.open(folder), TensorSource(everything())):
        for index in ([70], [-1], [0, 99]):
            with pytest.raises(IndexError, match="there are 70"):
                source.rows(index)
        for index in (np.array([0.5]), np.ones(70, dtype=bool), np.zeros((2, 2), dtype=int)):
            with pytest.raises(TypeError, match="integers of shape"):
                source.rows(index)
        assert source.rows([]).shape == (0, 6)


@pytest.mark.parametrize(
    ("activations", "error", "message"),
    [
        (torch.ones(3, 2, dtype=torch.int64), TypeError, "torch.int64"),
        (np.ones((3, 2)), TypeError, "float64"),
        ([[1.0]], TypeError, "list"),
        (torch.ones(3), ValueError, r"\(3,\)"),
        (torch.ones(3, 2, 2), ValueError, r"\(3, 2, 2\)"),
        (torch.ones(0, 2), ValueError, r"\(0, 2\)"),
        (torch.tensor([[1.0], [float("nan")], [-float("inf")]]), ValueError, "2 of 3"),
    ],
)
def test_tensor_source_refuses(activations: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TensorSource(activations)


def test_tensor_source_gives_copies_without_a_graph() -> None:
    tensor = torch.ones(4, 2, requires_grad=True)
    source = TensorSource(tensor)
    rows = source.rows(slice(0, 4))
    assert not rows.requires_grad
    rows.zero_()
    assert tensor.detach().all()
