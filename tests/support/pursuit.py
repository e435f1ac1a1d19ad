from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from expander_sae.dictionary import DenseMatrix, ExpanderMatrix, Matrix
from expander_sae.mask import Mask
from expander_sae.ops import SparseCode, has_fast_cpu

M, N, DEGREE = 64, 160, 5


def expander(
    m: int = M,
    n: int = N,
    degree: int = DEGREE,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    unit: bool = True,
) -> ExpanderMatrix:
    mask = Mask.build("left-regular", d_in=m, d_sae=n, degree=degree, seed=seed)
    values = torch.randn(n, degree, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if unit:
        values = values / values.norm(dim=1, keepdim=True)
    return ExpanderMatrix(mask.rows, values.to(dtype), m)


def dense(matrix: Matrix) -> DenseMatrix:
    return DenseMatrix(matrix.to_dense().T.contiguous())


def gaussian(batch: int, m: int = M, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def planted(matrix: Matrix, batch: int, k: int, *, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Samples that are exactly ``k``-sparse, coefficients of magnitude 1 to 2, and the dense codes behind them."""
    generator = torch.Generator().manual_seed(seed)
    support = torch.rand(batch, matrix.d_sae, generator=generator).argsort(dim=1)[:, :k].to(torch.int32)
    size = 1 + torch.rand(batch, k, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, (batch, k), generator=generator) * 2 - 1
    code = SparseCode(support, (size * sign).to(matrix.dtype))
    return matrix.decode(code), code.to_dense(matrix.d_sae)


@pytest.fixture(params=["expander", "dense"])
def make_matrix(request: pytest.FixtureRequest) -> Callable[..., Matrix]:
    def make(*args: int, **options) -> Matrix:
        matrix = expander(*args, **options)
        return matrix if request.param == "expander" else dense(matrix)

    return make


@pytest.fixture
def matrix(make_matrix: Callable[..., Matrix]) -> Matrix:
    return make_matrix()


needs_kernels = pytest.mark.skipif(not has_fast_cpu(), reason="the C++ kernels are not in this installation")
