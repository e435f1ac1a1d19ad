"""Every solver where no gradient can be: in inference mode, on expander and on dense dictionaries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.pursuit import dense, expander, gaussian
from torch import Tensor

from expander_sae.ops import SparseCode
from expander_sae.pursuit import SOLVERS
from expander_sae.pursuit.unrolled import unrolled_matching_pursuit

EXPANDER_ONLY = {"parallel-l0", "serial-l0", "robust-l0", "smp", "ssmp", "expander-recovery", "lddsr"}


def check(solve: Callable[[Tensor], SparseCode]) -> None:
    h = gaussian(6)
    expected = solve(h)
    with torch.inference_mode():
        found = solve(h.clone())
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("name", SOLVERS)
def test_expander(name: str) -> None:
    check(lambda h: SOLVERS[name](h, expander(), 7))


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in EXPANDER_ONLY])
def test_dense(name: str) -> None:
    check(lambda h: SOLVERS[name](h, dense(expander()), 7))


@pytest.mark.parametrize("reselect", [False, True])
@pytest.mark.parametrize("convert", [lambda matrix: matrix, dense])
def test_unrolled(reselect: bool, convert: Callable) -> None:
    check(lambda h: unrolled_matching_pursuit(convert(expander()), h, 7, reselect=reselect))
