"""Pruning a matrix to the largest entries of each column."""

from __future__ import annotations

import pytest
import torch

from expander_sae.dictionary import DenseMatrix, ExpanderMatrix, prune


def test_the_largest_entries_of_each_column_are_kept() -> None:
    values = torch.tensor([[3.0, -5.0, 1.0, 4.0], [0.5, 0.25, -2.0, 1.0], [0.0, 0.0, 0.0, -1.0]])
    mask, kept = prune(DenseMatrix(values), 2)
    assert mask.rows[:2].tolist() == [[1, 3], [2, 3]]
    assert kept[:2].tolist() == [[-5.0, 4.0], [-2.0, 1.0]]
    assert 3 in mask.rows[2]
    assert (mask.d_in, mask.recipe) == (4, None)


def test_no_projection_onto_as_few_entries_is_nearer() -> None:
    dense = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    _, kept = prune(DenseMatrix(dense), 3)
    lost = dense.square().sum(dim=1) - kept.square().sum(dim=1)
    for seed in range(50):
        other = torch.rand(20, 9, generator=torch.Generator().manual_seed(seed)).topk(3, dim=1).indices
        assert (lost <= dense.square().sum(dim=1) - dense.gather(1, other).square().sum(dim=1) + 1e-6).all()


def test_all_entries_give_the_matrix_back() -> None:
    matrix = DenseMatrix(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    mask, kept = prune(matrix, 4)
    assert torch.equal(ExpanderMatrix(mask.rows, kept, 4).to_dense(), matrix.to_dense())


@pytest.mark.parametrize("degree", [0, 5])
def test_a_degree_that_does_not_fit(degree: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and d_in = 4, got {degree}"):
        prune(DenseMatrix(torch.ones(3, 4)), degree)
