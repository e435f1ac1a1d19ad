"""The common ground of the solvers: inputs checked and scaled, memory capped, the code back in the input's units.

Every solver works on *unit* columns and on samples scaled by a power of two to a largest entry in ``[½, 1)``. Scores
are therefore normalised correlations ``⟨w_j, r⟩ / ‖w_j‖`` whatever the dictionary's norms are, tolerances are relative,
and no square can overflow. 16-bit inputs are solved in float32; float64 stays float64.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from expander_sae.dictionary import Dictionary, Matrix
from expander_sae.ops import SparseCode
from expander_sae.ops.reference import accumulate_dtype
from expander_sae.pursuit import cpu
from expander_sae.pursuit.code import PursuitCode

WORKING_BYTES = 1 << 28  # memory a solver may use for its per-sample arrays; a batch beyond it is worked off in chunks
SCORE_ARRAYS = 4  # (B, n) arrays alive at once in a greedy solver: correlations at first and now, scores, one more
GRAM_ROW_COST = 4  # adding up one row of the Gram matrix takes the time of a correlation with this many entries of h
GRAM_PAYS = 2  # it costs n correlations, and not all of what follows is saved


class Solution(NamedTuple):
    """What a solver hands back for a chunk: slots ``(B, k)``, in the problem's units."""

    features: Tensor  # int64 (B, k)
    values: Tensor  # float (B, k)
    used: Tensor  # bool (B, k): which slots hold a feature
    rounds: Tensor  # int (B,)


@dataclass(frozen=True)
class Problem:
    """``targets ≈ matrix · x`` for a chunk of samples.

    Attributes:
        matrix: unit columns (a zero column stays zero), no autograd.
        targets: ``(B, m)``, scaled.
        k: the most features a sample may use.
        first: position of the chunk in the flattened batch.
        gram: ``WᵀW (n, n)`` where sums of its rows are worth making it.
    """

    matrix: Matrix
    targets: Tensor
    k: int
    first: int
    gram: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.targets.shape[0]

    @property
    def floor(self) -> Tensor:
        """``(B,)``: correlations up to this are rounding error, of a residual computed from ``targets``."""
        return 32 * torch.finfo(self.targets.dtype).eps * self.targets.norm(dim=1)

    def target_norms(self, tol: float | None) -> Tensor:
        """``(B,)``: the residual norm at which a sample is done; ``tol`` is relative to the sample's own norm."""
        return self.floor if tol is None else self.targets.norm(dim=1) * tol + torch.finfo(self.targets.dtype).tiny

    @cached_property
    def correlations(self) -> Tensor:
        """``Wᵀ targets``, ``(B, n)``. Not to be written to."""
        return self.matrix.correlate(self.targets)

    def correlate(self, features: Tensor, values: Tensor, residual: Tensor) -> Tensor:
        """``Wᵀ residual``, ``(B, n)``, of the ``residual`` that this code leaves; unused slots must have value 0.

        The caller may write to it.
        """
        if features.shape[1] == 0:
            return self.correlations.clone()
        explained = self._through_gram(features, values)
        if explained is None:
            return self.matrix.correlate(residual)
        return torch.sub(self.correlations, explained, out=explained)

    def correlate_code(self, features: Tensor, values: Tensor) -> Tensor:
        """``Wᵀ W x``, ``(B, n)``; unused slots must have value 0."""
        explained = self._through_gram(features, values)
        return self.matrix.correlate(self.combine(features, values)) if explained is None else explained

    def _through_gram(self, features: Tensor, values: Tensor) -> Tensor | None:
        if self.gram is None or features.shape[1] * GRAM_ROW_COST > self.matrix.d_in:
            return None
        return F.embedding_bag(features, self.gram, per_sample_weights=values, mode="sum")

    def products(self, feature: Tensor, others: Tensor) -> Tensor:
        """``⟨w_f, w_o⟩``, ``(B, p)``, of ``feature (B, 1)`` with ``others (B, p)``."""
        if others.shape[1] == 0:
            return self.targets.new_zeros(others.shape)
        if self.gram is not None:
            return self.gram[feature, others]
        return self.matrix.correlate_at(self.matrix.columns(feature.squeeze(1)), others.to(torch.int32))

    def combine(self, features: Tensor, values: Tensor) -> Tensor:
        """``W x``, ``(B, m)``; unused slots must have value 0."""
        return self.matrix.decode(SparseCode(features.to(torch.int32), values))

    def residual(self, features: Tensor, values: Tensor) -> Tensor:
        """``targets - W x``, ``(B, m)``."""
        return self.targets - self.combine(features, values)


def as_matrix(dictionary: Matrix | Dictionary) -> Matrix:
    """The map of a dictionary, held still and outside the autograd graph.

    Raises:
        TypeError: something that is neither a dictionary nor a matrix.
    """
    if not callable(getattr(dictionary, "matrix", None)):
        raise TypeError(
            f"expected a Dictionary or a Matrix, got {type(dictionary).__name__}; of an SAE give sae.dictionary "
            "together with b_dec=sae.b_dec, of a dense array DenseMatrix(array.T), one feature in each row"
        )
    with torch.no_grad():
        return dictionary.matrix().detach()


def supports(matrix: Matrix) -> Tensor:
    """int32 ``(n, d)``, the rows of every column, or :class:`ValueError` if its columns are dense."""
    if matrix.support is None:
        raise ValueError("this solver compares the rows of sparse columns: it needs an expander dictionary")
    return matrix.support


def run(
    solver: Callable[[Problem], Solution],
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    b_dec: Tensor | None,
    *,
    rounds: int = 0,
    cells: Callable[[Matrix], int] | None = None,
    fast: Callable[[Tensor, Matrix, Tensor], dict[str, Any]] | None = None,
    backend: str | None = None,
) -> PursuitCode:
    """Check the inputs, run ``solver`` chunk by chunk, and bring the code back to the units of ``h``.

    Args:
        solver: works on one chunk.
        h: ``(..., m)``.
        dictionary: a dictionary or its matrix.
        k: features per sample.
        b_dec: ``(m,)``, subtracted from ``h`` first; ``None`` for zero.
        rounds: how often the solver asks for :meth:`Problem.correlate`, at most.
        cells: floats needed per sample; default: what a greedy solver needs.
        fast: the same solver in C++, if there is one; called with all samples, unit columns and the norms they had.
        backend: ``None`` (C++ where it applies), ``"reference"`` (PyTorch) or ``"cpu"`` (C++ or an error).

    Raises:
        TypeError: ``h`` is not floating point, or the dictionary is of no known kind.
        ValueError: wrong width, ``k`` outside ``[1, d_sae]``, or entries that are not finite.
    """
    matrix, h, k = as_matrix(dictionary), torch.as_tensor(h), operator.index(k)
    check(h, matrix, k, b_dec)
    with torch.no_grad():
        wide = accumulate_dtype(torch.promote_types(h.dtype, matrix.dtype))
        unit, norms = matrix.unit(wide)
        flat = h.detach().reshape(-1, matrix.d_in).to(wide)
        if b_dec is not None:
            flat = flat - b_dec.detach().to(wide)
        flat, unit = unit.coordinates(flat), unit.core
        if flat.shape[0] == 0:
            return _nothing(h, k, wide)
        if fast is not None and cpu.chosen(backend, unit, wide):
            result = fast(flat, unit, norms)  # which refuses samples that are not finite itself
            result["values"] = result["values"].to(h.dtype)
            return PursuitCode(**result).reshape(*h.shape[:-1])
        refuse_infinite(flat)
        # Plus what every solver keeps: factor, Gram and columns of its support.
        per_sample = cells(unit) if cells else SCORE_ARRAYS * matrix.d_sae + 2 * k * k + k * matrix.d_in
        gram = whole_gram(unit, flat.shape[0] * rounds) if _adds_rows_fast(unit) else None
        parts, first = [], 0
        for part in chunks(flat, per_sample):
            parts.append(_finish(solver, Problem(unit, part, k, first, gram), norms))
            first += part.shape[0]
        merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        merged["values"] = merged["values"].to(h.dtype)
        return PursuitCode(**merged).reshape(*h.shape[:-1])


def _nothing(h: Tensor, k: int, dtype: torch.dtype) -> PursuitCode:
    """The code of an empty batch."""
    shape = h.shape[:-1]
    return PursuitCode(
        indices=torch.zeros(*shape, k, dtype=torch.int32, device=h.device),
        values=h.new_zeros(*shape, k),
        residual_norms=h.new_zeros(shape, dtype=dtype),
        iterations=torch.zeros(shape, dtype=torch.int32, device=h.device),
        stopped_early=torch.zeros(shape, dtype=torch.bool, device=h.device),
    )


def whole_gram(matrix: Matrix, correlations: int) -> Tensor | None:
    """``WᵀW (n, n)`` if the matrix has it in one product, it fits, and ``correlations`` of one sample each pay."""
    n = matrix.d_sae
    if correlations < GRAM_PAYS * n or n * n * matrix.dtype.itemsize > WORKING_BYTES:
        return None
    return matrix.whole_gram()


def _adds_rows_fast(matrix: Matrix) -> bool:
    """Whether weighted rows of a Gram matrix are added up faster than ``Wᵀr`` is multiplied out.

    On a CPU, that is, and in float32: PyTorch's sum of weighted rows is slow in float64.
    """
    return matrix.device.type == "cpu" and matrix.dtype == torch.float32


def _finish(solver: Callable[[Problem], Solution], problem: Problem, norms: Tensor) -> dict[str, Any]:
    exponent = torch.frexp(problem.targets.abs().amax(dim=1, keepdim=True)).exponent
    problem = replace(problem, targets=_shift(problem.targets, -exponent))
    features, values, used, rounds = solver(problem)
    # Used slots first, in the order of selection.
    order = used.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    used = used.gather(1, order)
    features = torch.where(used, features.gather(1, order), 0)
    values = torch.where(used, values.gather(1, order), 0.0)
    residual = problem.residual(features, values).norm(dim=1)
    return {
        "indices": features.to(torch.int32),
        "values": _shift(values, exponent) / norms[features],
        "residual_norms": _shift(residual, exponent.squeeze(1)),
        "iterations": rounds.to(torch.int32),
        "stopped_early": ~used.all(dim=1),
    }


def _shift(x: Tensor, exponent: Tensor) -> Tensor:
    """``x · 2^exponent``, in two steps, because the power itself may leave the type's range."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(x, half), exponent - half)


def check(h: Tensor, matrix: Matrix, k: int, b_dec: Tensor | None) -> None:
    """Raise on inputs no solver can use; see :func:`run`."""
    if not h.is_floating_point():
        raise TypeError(f"activations must be floating point, got {h.dtype}; convert them with .float()")
    if h.dim() == 0 or h.shape[-1] != matrix.d_in:
        raise ValueError(
            f"activations have shape {tuple(h.shape)}, the dictionary has d_in = {matrix.d_in}: expected (..., d_in)"
        )
    if not 1 <= k <= matrix.d_sae:
        raise ValueError(f"k must be between 1 and d_sae = {matrix.d_sae}, got {k}: a code cannot have more features")
    if b_dec is not None and b_dec.shape != (matrix.d_in,):
        raise ValueError(f"b_dec must have shape ({matrix.d_in},), got {tuple(b_dec.shape)}")


def refuse_infinite(flat: Tensor) -> None:
    """Raise :class:`ValueError` if a sample of ``flat (B, m)`` has an infinite or NaN entry."""
    finite = flat.isfinite().all(dim=1)
    if not bool(finite.all()):
        bad = flat.shape[0] - int(finite.sum())
        raise ValueError(f"{bad} of {flat.shape[0]} samples have entries that are not finite; leave them out first")


def chunks(flat: Tensor, cells_per_sample: int) -> Iterator[Tensor]:
    """``flat`` in pieces that keep ``cells_per_sample`` floats per sample under :data:`WORKING_BYTES`."""
    size = max(1, WORKING_BYTES // (cells_per_sample * flat.element_size()))
    yield from flat.split(size)


def squared_norm(matrix: Matrix) -> float:
    """An upper estimate of ``‖W‖₂²``: 50 steps of power iteration, and 5 % on top for what they leave open."""
    combine = matrix.synthesis()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, matrix.d_sae, generator=generator, dtype=matrix.dtype).to(matrix.device)
    largest = 1.0
    for _ in range(50):
        x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
        x = matrix.correlate(combine(x))
        largest = float(x.norm())
    return max(1.05 * largest, 1e-6)  # a matrix of zeros: any step does
