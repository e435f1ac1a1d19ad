"""Encode: the ``k`` largest of ``Wᵀh + b_enc``, gathered on the expander or multiplied and sorted dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Shape, activations, expander_sae
from benchmarks.checks import WrongAnswer, same_topk
from benchmarks.measure import Race, Row, Settings
from expander_sae.dictionary import ExpanderMatrix, Matrix
from expander_sae.ops import Selection, SparseCode, reference
from expander_sae.sae import SAE, TiedEncoder

OURS = "expander"
Precision = Literal["highest", "medium"]
PRECISIONS: tuple[Precision, ...] = ("highest", "medium")
"""``highest`` is PyTorch's default. ``medium`` lets the product use bfloat16 where the processor multiplies in it, and
on many others only picks a faster float32 routine: then it is the stronger baseline."""

_CHECKED_ALONE = 4  # samples checked where the dense scores do not fit
_BLOCK = 1 << 16  # features scored at a time there


def run(shape: Shape, settings: Settings) -> list[Row]:
    """Ours against ``torch`` matmul and topk on the same matrix; alone where the dense one does not fit."""
    race = Race("encode", shape, settings)
    h = activations(shape.d_in, settings.batch)
    matrix, b_enc = encoder_parts(expander_sae(shape))

    def ours() -> Callable[[], SparseCode]:
        own, bias = matrix_copy(matrix), b_enc.clone()
        return lambda: own.select(h, bias, Selection(shape.k))

    code = race.enter(OURS, ours, samples=settings.batch, ours=True)
    assert code is not None
    scores: Tensor | None = None
    for precision in PRECISIONS:
        name = f"torch matmul + topk, {precision} precision"
        needs = 2 * shape.dense_bytes + 2 * 4 * settings.batch * shape.d_sae
        build = partial(_dense, h, matrix, b_enc, shape.k, precision)
        dense = race.enter(name, build, samples=settings.batch, needs=needs)
        if dense is None:
            continue
        if scores is None:
            scores = F.linear(h, matrix.to_dense().T, b_enc)
            race.note(OURS, same_topk(OURS, code, scores, dense))
        try:
            race.note(name, same_topk(name, dense, scores, code))
        except WrongAnswer as error:
            if precision == "highest":
                raise
            race.absent(name, f"left out, not float32 on this processor ({error})")
    if scores is None:
        few = SparseCode(code.indices[:_CHECKED_ALONE], code.values[:_CHECKED_ALONE])
        race.note(OURS, same_topk(OURS, few, scores_of(h[:_CHECKED_ALONE], matrix, b_enc)))
    return race.rows()


def encoder_parts(sae: SAE) -> tuple[ExpanderMatrix, Tensor]:
    """Matrix and encoder bias of a tied expander SAE, without autograd."""
    matrix = sae.dictionary.matrix().detach()
    assert isinstance(matrix, ExpanderMatrix)
    assert isinstance(sae.encoder, TiedEncoder)
    return matrix, sae.encoder.b_enc.detach()


def matrix_copy(matrix: ExpanderMatrix) -> ExpanderMatrix:
    """The matrix in memory of its own."""
    return ExpanderMatrix(matrix.rows.clone(), matrix.values.clone(), matrix.d_in)


def scores_of(h: Tensor, matrix: ExpanderMatrix, b_enc: Tensor) -> Tensor:
    """``Wᵀh + b_enc`` of a few samples by the reference, block by block."""
    blocks: Iterator[tuple[Tensor, Tensor]] = zip(matrix.rows.split(_BLOCK), matrix.values.split(_BLOCK), strict=True)
    return torch.cat([reference.correlate(h, rows, values) for rows, values in blocks], dim=1) + b_enc


def _dense(h: Tensor, matrix: Matrix, b_enc: Tensor, k: int, precision: Precision) -> Callable[[], SparseCode]:
    weight = matrix.to_dense().T.contiguous()

    def encode() -> SparseCode:
        with matmul_precision(precision):
            values, indices = torch.topk(F.linear(h, weight, b_enc), k)
        return SparseCode(indices, values)

    return encode


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """``torch.set_float32_matmul_precision``, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
