"""The pursuits in C++ (``csrc/pursuit*``): expander dictionaries on the CPU, in float32.

Same meaning as the PyTorch solvers beside this module. Results do not depend on the number of threads, bit for bit; the
threads are ``torch.get_num_threads()``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expander_sae.dictionary import Matrix
from expander_sae.ops import cpu as kernels
from expander_sae.ops import resolve_backend


def chosen(backend: str | None, matrix: Matrix, dtype: torch.dtype) -> bool:
    """Whether a pursuit runs here rather than in PyTorch; ``dtype`` is the type it computes in.

    ``backend=None`` takes the kernels where they apply.

    Raises:
        ValueError: unknown ``backend``, or ``"cpu"`` for a pursuit that the kernels do not do.
        RuntimeError: ``"cpu"`` where the kernels were not built or the tensors are on another device.
    """
    applies = matrix.support is not None and dtype == torch.float32
    if backend == "cpu" and not applies:
        raise ValueError(
            "backend='cpu' runs pursuits on expander dictionaries in float32; use backend=None for this one"
        )
    return resolve_backend(backend, matrix.device) == "cpu" and applies


def omp(
    targets: Tensor,
    matrix: Matrix,
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
    return _run("omp", targets, matrix, norms, k, tol, signed, nonnegative, block=block, disjoint=disjoint)


def matching_pursuit(
    targets: Tensor,
    matrix: Matrix,
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
    options = {"reselect": reselect, "refit": refit}
    return _run("matching_pursuit", targets, matrix, norms, k, tol, signed, nonnegative, **options)


def _run(
    name: str,
    targets: Tensor,
    matrix: Matrix,
    norms: Tensor,
    k: int,
    tol: float | None,
    signed: bool,
    nonnegative: bool,
    **options: int,
) -> dict[str, Any]:
    batch = targets.shape[0]
    rows = matrix.support
    assert rows is not None  # see `chosen`
    n, d = rows.shape
    given = {"h": targets, "rows": rows, "values": matrix.values, "norms": norms}
    inputs = {key: tensor.contiguous() for key, tensor in given.items()}
    used = torch.zeros(batch, dtype=torch.int32)
    outputs = {
        "indices": torch.zeros(batch, k, dtype=torch.int32),
        "code": torch.zeros(batch, k),
        "residual_norms": torch.zeros(batch),
        "iterations": torch.zeros(batch, dtype=torch.int32),
        "used": used,
    }
    choices = {"tol": -1.0 if tol is None else tol, "positive": signed or nonnegative, "nonnegative": nonnegative}
    sizes = {"B": batch, "m": matrix.d_in, "n": n, "d": d, "k": k}
    kernels.run_kernel(name, inputs | outputs, **sizes, **choices, **options)
    if bool((used < 0).any()):
        bad = int((used < 0).sum())
        raise ValueError(f"{bad} of {batch} samples have entries that are not finite; leave them out first")
    return {
        "indices": outputs["indices"],
        "values": outputs["code"],
        "residual_norms": outputs["residual_norms"],
        "iterations": outputs["iterations"],
        "stopped_early": used < k,
    }
