"""From dense columns to sparse ones: the largest entries of each."""

from __future__ import annotations

from torch import Tensor

from expander_sae.dictionary.matrix import Matrix
from expander_sae.mask import Mask, sort_entries


def prune(matrix: Matrix, degree: int) -> tuple[Mask, Tensor]:
    """The ``degree`` entries of largest magnitude of each column.

    Args:
        matrix: ``(m, n)``; the magnitudes of a trained dictionary of unit columns are comparable.
        degree: entries kept in each column.

    Returns:
        The supports, a mask without a recipe, and the entries on them ``(n, degree)``, as they were: not normalised.

    Raises:
        ValueError: ``degree`` outside ``[1, d_in]``.
    """
    if not 1 <= degree <= matrix.d_in:
        raise ValueError(f"degree must be between 1 and d_in = {matrix.d_in}, got {degree}")
    columns = matrix.detach().to_dense().T
    rows = columns.abs().topk(degree, dim=1).indices
    kept, values = sort_entries(rows, columns.gather(1, rows))
    return Mask.from_rows(kept, matrix.d_in), values
