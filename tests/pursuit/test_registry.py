"""Solvers by name, in one call form."""

from __future__ import annotations

import pytest
import torch
from support.pursuit import M, N, expander, gaussian

from expander_sae.pursuit import SOLVERS, PursuitCode, check_options, omp, options_of, solver


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_has_the_one_call_form(name: str) -> None:
    matrix = expander()
    h = gaussian(6).reshape(2, 3, M)
    b_dec = gaussian(1, seed=4)[0]
    code = SOLVERS[name](h, matrix, 7, b_dec=b_dec)
    assert isinstance(code, PursuitCode)
    assert code.indices.shape == code.values.shape == (2, 3, 7)
    assert code.indices.dtype == torch.int32
    assert ((code.indices >= 0) & (code.indices < N)).all()
    residual = (h - b_dec - matrix.decode(code)).norm(dim=-1)
    torch.testing.assert_close(code.residual_norms, residual)
    used = (code.values != 0).sum(dim=-1)
    assert (code.stopped_early | (used == 7)).all()
    assert SOLVERS[name](h[:0], matrix, 7).indices.shape == (0, 3, 7)


@pytest.mark.parametrize("name", SOLVERS)
def test_same_inputs_same_bits(name: str) -> None:
    matrix, h = expander(dtype=torch.float32), gaussian(6, dtype=torch.float32)
    first, second = SOLVERS[name](h, matrix, 7), SOLVERS[name](h, matrix, 7)
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.values, second.values)


def test_options_are_listed_and_checked() -> None:
    assert options_of("omp") == {
        "block": 1,
        "disjoint": False,
        "tol": None,
        "nonnegative": False,
        "signed": False,
        "backend": None,
    }
    check_options("omp", {"block": 8})
    with pytest.raises(ValueError, match=r"solver 'omp' has no option 'blok'; did you mean 'block'.*it takes 'block'"):
        check_options("omp", {"blok": 8})
    with pytest.raises(ValueError, match="unknown solver 'lars'; choose one of 'omp'"):
        solver("lars")
    assert solver("omp") is omp
