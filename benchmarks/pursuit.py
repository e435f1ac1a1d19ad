"""Pursuit: OMP, and matching pursuit with a refit, against the OMP of other projects on the same columns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import Shape, activations, expander_sae
from benchmarks.checks import WrongAnswer, residuals, same_pursuit
from benchmarks.encode import encoder_parts, matrix_copy
from benchmarks.measure import Race, Row, Settings
from expander_sae.dictionary import DenseMatrix
from expander_sae.pursuit import PursuitCode, matching_pursuit, ols, omp

OMP, MP, DENSE_OMP = "OMP", "MP + refit", "OMP, dense dictionary"
SAMPLES = {"sklearn": 16, "spams": 1024, "orthogonal_matching_pursuit_gpu": 256}
"""How many samples of the batch the peers get: by module."""

_REFERENCE_SAMPLES = 16
_MP_MARGIN = 0.02  # MP with a refit may leave this much more than OMP, relative


def run(shape: Shape, settings: Settings) -> list[Row]:
    """Ours on the whole batch; peers on its first samples, :data:`SAMPLES` of them."""
    race = Race("pursuit", shape, settings)
    h, k = activations(shape.d_in, settings.batch), shape.k
    matrix, _ = encoder_parts(expander_sae(shape))
    weight = matrix.to_dense().T.contiguous()
    wide = weight.double()

    def left(code: PursuitCode | tuple[Tensor, Tensor]) -> Tensor:
        indices, values = code if isinstance(code, tuple) else (code.indices, code.values)
        return residuals(h[: len(indices)], wide, indices, values)

    def contender(solve: Callable[..., PursuitCode]) -> Callable[[], PursuitCode]:
        own = matrix_copy(matrix)
        return lambda: solve(h, own, k)

    def dense_contender(dtype: torch.dtype) -> Callable[[], PursuitCode]:
        samples, own = h.to(dtype), DenseMatrix(weight.to(dtype))
        return lambda: omp(samples, own, k)

    exact = race.enter(OMP, lambda: contender(omp), samples=len(h), ours=True)
    quick = race.enter(MP, lambda: contender(matching_pursuit), samples=len(h), ours=True)
    assert exact is not None
    assert quick is not None
    few = h[:_REFERENCE_SAMPLES]
    for name, code, solve in ((OMP, exact, omp), (MP, quick, matching_pursuit)):
        slow, first = solve(few, matrix, k, backend="reference"), (code.indices[: len(few)], code.values[: len(few)])
        same_pursuit(name, [first[0], slow.indices], [left(first), left(slow)])
    least, mine = left(exact), left(quick)
    excess = float(mine.mean() / least.mean()) - 1
    if excess > _MP_MARGIN:
        raise WrongAnswer(f"{MP} leaves {excess:.1%} more than OMP on average, {_MP_MARGIN:.0%} was expected at most")
    race.note(OMP, f"mean residual {float(least.mean()):.4f}")
    race.note(MP, f"mean residual {float(mine.mean()):.4f}, {excess:+.1%}")

    for dtype in (torch.float32, torch.float64):
        name = f"{DENSE_OMP}, {str(dtype).removeprefix('torch.')}"
        dense = race.enter(name, partial(dense_contender, dtype), samples=len(h), ours=True)
        assert dense is not None
        race.note(name, same_pursuit(name, [dense.indices, exact.indices], [left(dense), least]))

    peer_codes = partial(_enter, race, h)
    for name, module, build in _omp_peers(weight, k):
        if (code := peer_codes(name, module, build, k)) is not None:
            count = len(code[0])
            race.note(name, same_pursuit(name, [code[0], exact.indices[:count]], [left(code), least[:count]]))
    selected: PursuitCode | None = None
    for dtype in (np.float64, np.float32):
        name = f"SPAMS omp, {dtype.__name__}"
        build = partial(peers.spams_omp, dense=weight, k=k, dtype=dtype, threads=settings.threads)
        if (code := peer_codes(name, "spams", build, k)) is not None:
            count = len(code[0])
            selected = selected or ols(h[:count], matrix, k)
            agreed = same_pursuit(name, [code[0], selected.indices], [left(code), left(selected)])
            gain = float(left(code).mean() / least[:count].mean()) - 1
            race.note(name, f"orthogonal least squares, {agreed} as our ols; residual {gain:+.1%} against OMP's")
    return race.rows()


def _omp_peers(weight: Tensor, k: int) -> list[tuple[str, str, Callable[..., peers.Codes]]]:
    """Name, module and builder of the peers that do plain OMP."""
    found: list[tuple[str, str, Callable[..., peers.Codes]]] = [
        (
            f"scikit-learn orthogonal_mp_gram, {dtype.__name__}",
            "sklearn",
            partial(peers.sklearn_omp, dense=weight, k=k, dtype=dtype),
        )
        for dtype in (np.float64, np.float32)
    ]
    package = "orthogonal_matching_pursuit_gpu"
    return found + [
        (
            f"orthogonal-matching-pursuit-gpu {name}",
            package,
            partial(peers.batched_omp, dense=weight, k=k, algorithm=name),
        )
        for name in ("v0", "naive")
    ]


def _enter(
    race: Race, h: Tensor, name: str, module: str, build: Callable[..., peers.Codes], k: int
) -> tuple[Tensor, Tensor] | None:
    """A peer's code of its share of ``h``; ``None`` if it is not installed."""
    if peers.module(module) is None:
        race.absent(name, peers.NOT_INSTALLED)
        return None
    part = h[: SAMPLES[module]].clone()
    return peers.code_of(race.enter(name, partial(build, part), samples=len(part)), k)
