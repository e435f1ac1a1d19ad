"""The operations under ``torch.func`` and in inference mode, expander and dense, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vjp

from expander_sae import ops
from expander_sae.mask import Mask
from expander_sae.ops import Selection, SparseCode, cpu, dense
from expander_sae.ops.fused import tied_error

M, N, D, B, K = 7, 11, 3, 4, 3
ROWS = Mask.build("left-regular", d_in=M, d_sae=N, degree=D, seed=1).rows
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not ops.has_fast_cpu(), reason="no C++ kernels"))]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


ABOVE = Selection(K, 0.0)
SUPPORTS = torch.randint(0, N, (B, K), generator=torch.Generator().manual_seed(3), dtype=torch.int32)

#  name -> a scalar function of its tensors
EXPANDER: dict[str, tuple[Callable[[str], Callable[..., Tensor]], tuple[Tensor, ...]]] = {
    "correlate": (
        lambda b: lambda h, v: ops.correlate(h, ROWS, v, backend=b).square().sum(),
        (normal(B, M), normal(N, D)),
    ),
    "encode": (
        lambda b: lambda h, v, c, s: ops.encode(h, ROWS, v, c, ABOVE, center=s, backend=b).values.square().sum(),
        (normal(B, M), normal(N, D), normal(N), normal(M)),
    ),
    "decode": (
        lambda b: lambda x, v: ops.decode(SparseCode(SUPPORTS, x), ROWS, v, M, backend=b).square().sum(),
        (normal(B, K), normal(N, D)),
    ),
    "correlate_at": (
        lambda b: lambda h, v: ops.correlate_at(h, SUPPORTS, ROWS, v, backend=b).square().sum(),
        (normal(B, M), normal(N, D)),
    ),
    "values_grad": (
        lambda b: lambda h, c: ops.values_grad(h, SUPPORTS, c, ROWS, backend=b).square().sum(),
        (normal(B, M), normal(B, K)),
    ),
    "gram": (lambda b: lambda v: ops.gram(SUPPORTS, ROWS, v, M, backend=b).square().sum(), (normal(N, D),)),
    "tied_error": (
        lambda b: lambda v, c, s: tied_error(normal(B, M), ROWS, v, c, s, Selection(K), backend=b).error,
        (normal(N, D), normal(N), normal(M)),
    ),
}  # fmt: skip
DENSE: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "encode": (
        lambda h, w, c, s: dense.encode(h, w, c, Selection(K, 0.0), center=s).values.square().sum(),
        (normal(B, M), normal(N, M), normal(N), normal(M)),
    ),
    "decode": (lambda x, w: dense.decode(SUPPORTS, x, w).square().sum(), (normal(B, K), normal(N, M))),
    "correlate_at": (
        lambda h, w: dense.correlate_at(h, SUPPORTS, w).square().sum(),
        (normal(B, M), normal(N, M)),
    ),
}


def check(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(function(*leaves), leaves)
    assert all(bool((tensor != 0).any()) for tensor in expected)
    places = tuple(range(len(inputs)))
    found, value = grad_and_value(function, argnums=places)(*inputs)
    torch.testing.assert_close(found, expected)
    _, pull = vjp(function, *inputs)
    torch.testing.assert_close(pull(torch.ones_like(value)), expected)
    with torch.inference_mode():
        torch.testing.assert_close(function(*(tensor.clone() for tensor in inputs)), value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EXPANDER)
def test_expander(name: str, backend: str) -> None:
    make, inputs = EXPANDER[name]
    check(make(backend), inputs)


@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str) -> None:
    check(*DENSE[name])


@pytest.mark.parametrize("name", [name for name in EXPANDER if name != "tied_error"])
def test_the_second_derivative(name: str) -> None:
    make, inputs = EXPANDER[name]
    function = make("reference")

    def norm(*tensors: Tensor, differentiate: Callable[..., Tensor]) -> Tensor:
        return differentiate(*tensors).square().sum()

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    (first,) = torch.autograd.grad(function(*leaves), leaves[:1], create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), leaves[:1])
    found = grad(lambda *tensors: norm(*tensors, differentiate=grad(function)))(*inputs)
    torch.testing.assert_close(found, expected)


class Autoencoder(nn.Module):
    def __init__(self, *, expander: bool) -> None:
        super().__init__()
        self.expander = expander
        self.values = nn.Parameter(normal(N, D if expander else M))
        self.bias = nn.Parameter(normal(M))

    def forward(self, h: Tensor) -> Tensor:
        if self.expander:
            code = ops.encode(h, ROWS, self.values, None, Selection(K), center=self.bias)
            return ops.decode(code, ROWS, self.values, M) + self.bias
        code = dense.encode(h, self.values, None, Selection(K), center=self.bias)
        return dense.decode(code.indices, code.values, self.values) + self.bias


@pytest.mark.parametrize("expander", [False, True])
def test_functional_call(expander: bool) -> None:
    module, h = Autoencoder(expander=expander).double(), normal(B, M)
    parameters = {name: tensor.detach() for name, tensor in module.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return (functional_call(module, given, (h,)) - h).square().sum()

    found = grad(loss)(parameters)
    (module(h) - h).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.skipif(not ops.has_fast_cpu(), reason="no C++ kernels")
def test_a_kernel_called_within_a_transform() -> None:
    """As the pursuits call them: on detached tensors, and into tensors made there."""
    h, values = normal(B, M), normal(N, D)
    _, expected = cpu.encode(h, ROWS, values, None, K)
    slope = grad(lambda given: cpu.encode(given, ROWS, values, None, K)[1].sum() * given.sum())(h)
    torch.testing.assert_close(slope, torch.full_like(h, expected.sum()))
