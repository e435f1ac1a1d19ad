"""The pursuits in C++ (``csrc/pursuit*``): expander dictionaries on the CPU, in float32.

Same meaning as the PyTorch solvers beside this module. Results do not depend on the number of threads, bit for bit; the
threads are ``torch.get_num_threads()``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expander_sae.dictionary import ExpanderMatrix, Matrix
from expander_sae.ops import cpu as kernels
from expander_sae.ops import resolve_backend


def chosen(backend: str | None, matrix: Matrix, dtype: torch.dtype) -> bool:
    """Whether a pursuit runs here rather than in PyTorch; ``dtype`` is the type it computes in.

    ``backend=None`` takes the kernels where they apply.

    Raises:
        ValueError: unknown ``backend``, or ``"cpu"`` for a pursuit that the kernels do not do.
        RuntimeError: ``"cpu"`` where the kernels were not built or the tensors are on another device.
    """
    applies = isinstance(matrix, ExpanderMatrix) and dtype == torch.float32
    if backend == "cpu" and not applies:
        raise ValueError(
            "backend='cpu' runs pursuits on expander dictionaries in float32; use backend=None for this one"
        )
    return resolve_backend(backend, matrix.device) == "cpu" and applies


def omp(
    targets: Tensor,
    matrix: ExpanderMatrix,
    norms: Tensor,
    k: int,
    *,
    block: int,
    disjoint: bool,
    tol: float | None,
    signed: bool,
    nonnegative: bool,
) -> dict[str, Any]:
    """See :func:`expander_sae.pursuit.omp`; ``targets (B, m)``, ``matrix`` of unit columns, the ``norms`` they had."""
    return _run("omp", targets, matrix, norms, k, tol, signed, nonnegative, block, disjoint)


def matching_pursuit(
    targets: Tensor,
    matrix: ExpanderMatrix,
    norms: Tensor,
    k: int,
    *,
    reselect: bool,
    refit: bool,
    tol: float | None,
    signed: bool,
    nonnegative: bool,
) -> dict[str, Any]:
    """See :func:`expander_sae.pursuit.matching_pursuit`; incremental. Arguments as :func:`omp`."""
    return _run("matching_pursuit", targets, matrix, norms, k, tol, signed, nonnegative, reselect, refit)


def _run(
    name: str,
    targets: Tensor,
    matrix: ExpanderMatrix,
    norms: Tensor,
    k: int,
    tol: float | None,
    signed: bool,
    nonnegative: bool,
    *options: int,
) -> dict[str, Any]:
    batch = targets.shape[0]
    n, d = matrix.rows.shape
    inputs = [tensor.contiguous() for tensor in (targets, matrix.rows, matrix.values, norms)]
    indices = torch.zeros(batch, k, dtype=torch.int32)
    values, residual_norms = torch.zeros(batch, k), torch.zeros(batch)
    iterations, used = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
    outputs = [indices, values, residual_norms, iterations, used]
    pointers = (tensor.data_ptr() for tensor in inputs + outputs)
    sizes = (batch, matrix.d_in, n, d, k)
    kernels.run_kernel(
        name, *pointers, *sizes, -1.0 if tol is None else tol, signed or nonnegative, nonnegative, *options
    )
    if bool((used < 0).any()):
        bad = int((used < 0).sum())
        raise ValueError(f"{bad} of {batch} samples have entries that are not finite; leave them out first")
    return {
        "indices": indices,
        "values": values,
        "residual_norms": residual_norms,
        "iterations": iterations,
        "stopped_early": used < k,
    }
