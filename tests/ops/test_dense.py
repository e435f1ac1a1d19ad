"""The dense baseline against plain autograd: the same numbers, the same order of equals, the same gradients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from expander_sae.ops import Selection, dense

M, N, B, K = 6, 9, 5, 3


def normal(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def supports(n: int = N) -> Tensor:
    indices = torch.randint(0, n, (B, K), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    indices[:, -1] = indices[:, 0]
    return indices


DIFFERENTIABLE: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]] = {
    "encode": (lambda h, w, c: encode(h, w, c, K)[1], lambda: (normal(B, M), normal(N, M), normal(N))),
    "encode, no bias": (lambda h, w: encode(h, w, None, K)[1], lambda: (normal(B, M), normal(N, M))),
    "encode, relu": (
        lambda h, w, c: encode(h, w, c - 1.5, N, 0.0)[1],
        lambda: (normal(B, M), normal(N, M), normal(N)),
    ),
    "encode, magnitude": (
        lambda h, w, c: encode(h, w, c, K, None, "magnitude")[1],
        lambda: (normal(B, M), normal(N, M), normal(N)),
    ),
    "decode": (lambda x, w: dense.decode(supports(), x, w), lambda: (normal(B, K), normal(N, M))),
    "correlate_at": (lambda h, w: dense.correlate_at(h, supports(), w), lambda: (normal(B, M), normal(N, M))),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name: str) -> None:
    function, inputs = DIFFERENTIABLE[name]
    assert gradcheck(function, inputs())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_is_refused_not_wrong(name: str) -> None:
    function, inputs = DIFFERENTIABLE[name]
    tensors = inputs()
    (first, *_rest) = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def encode(
    h: Tensor, weight: Tensor, bias: Tensor | None, k: int, threshold: float | None = None, rank: str = "signed"
) -> tuple[Tensor, Tensor]:
    code = dense.encode(h, weight, bias, Selection(k, threshold, rank))  # type: ignore[arg-type]
    return code.indices, code.values


@given(data=st.data(), relu=st.booleans())
def test_encode_and_decode_against_plain_autograd(data: st.DataObject, relu: bool) -> None:
    m, n, batch = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 12)), data.draw(st.integers(0, 4))
    k, seed = data.draw(st.integers(1, n)), data.draw(st.integers(0, 99))

    def run(encode_decode: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> list[Tensor]:
        leaves = normal(batch, m, seed=seed), normal(n, m, seed=seed), normal(n, seed=seed)
        code, recon = encode_decode(*leaves)
        (recon.square().sum() + (code**3).sum()).backward()
        return [recon.detach(), *(leaf.grad for leaf in leaves)]

    def ours(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        indices, values = encode(h, weight, bias, k, 0.0 if relu else None)
        assert indices.dtype == torch.int32
        return values, dense.decode(indices, values, weight)

    def plain(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = F.linear(h, weight, bias).topk(k, dim=1)
        values = values.relu() if relu else values
        x = torch.zeros(batch, n, dtype=h.dtype).scatter(1, indices, values)
        return values, x @ weight

    for found, expected in zip(run(ours), run(plain), strict=True):
        torch.testing.assert_close(found, expected)


def test_ties_go_to_the_lower_index_and_nan_comes_first() -> None:
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    indices, _ = encode(torch.tensor([[1.0, 5.0], [1.0, 0.0]]), weight, None, 3)
    assert indices.tolist() == [[2, 0, 1], [0, 1, 3]]
    bias = torch.tensor([0.0, 0.0, float("nan"), 0.0])
    indices, values = encode(torch.tensor([[1.0, 5.0]]), weight, bias, 2)
    assert indices.tolist() == [[2, 0]]
    assert values.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    h, weight, bias = normal(B, M, grad=False), normal(N, M, grad=False), normal(N, grad=False)
    h, weight, bias = (tensor.to(dtype).requires_grad_() for tensor in (h, weight, bias))
    indices, values = encode(h, weight, bias, K)
    recon = dense.decode(indices, values, weight)
    at = dense.correlate_at(h, indices, weight)
    assert values.dtype == recon.dtype == at.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    columns = weight.double()[indices.long()]
    torch.testing.assert_close(
        recon.double(), (values.double().unsqueeze(2) * columns).sum(1), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        at.double(), (columns @ h.double().unsqueeze(2)).squeeze(2), rtol=tolerance, atol=tolerance
    )
    (recon.sum() + at.sum()).backward()
    assert h.grad.dtype == weight.grad.dtype == bias.grad.dtype == dtype


def test_inactive_features_get_exactly_no_gradient() -> None:
    weight, bias = normal(N, M), normal(N)
    indices, values = encode(normal(B, M), weight, bias, 1)
    dense.decode(indices, values, weight).square().sum().backward()
    inactive = torch.ones(N, dtype=torch.bool)
    inactive[indices.flatten().long()] = False
    assert inactive.any()
    assert (weight.grad[inactive] == 0).all()
    assert (bias.grad[inactive] == 0).all()


def test_non_contiguous() -> None:
    def run(h: Tensor, weight: Tensor) -> list[Tensor]:
        h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
        indices, values = encode(h, weight, None, K)
        recon = dense.decode(indices, values, weight)
        at = dense.correlate_at(h, indices, weight)
        torch.autograd.backward([recon, at], [h.detach() ** 2, at.detach()])
        return [recon.detach(), at.detach(), h.grad, weight.grad]

    h, weight = normal(B, M, grad=False), normal(N, M, grad=False)
    for found, expected in zip(run(h.T.contiguous().T, weight.T.contiguous().T), run(h, weight), strict=True):
        torch.testing.assert_close(found, expected)


def test_memory_is_bounded_whatever_the_batch() -> None:
    """All scores of this batch would be 900 MiB, and as much again while the best are looked for."""
    script = """
import resource, torch
from expander_sae.ops import Selection, dense
torch.set_num_threads(2)
h, weight = torch.randn(50_000, 64), torch.randn(4608, 64)
dense.encode(h[:64], weight, None, Selection(32))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dense.encode(h, weight, None, Selection(32))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 500


def test_the_batch_is_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight, bias = normal(23, M), normal(N, M), normal(N)

    def run() -> list[Tensor]:
        indices, values = encode(h, weight, bias, K, 0.1)
        return [indices, values, *torch.autograd.grad(values.square().sum(), (h, weight, bias))]

    whole = run()
    monkeypatch.setattr(dense, "_SCORES_AT_ONCE", 5 * N)
    for found, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_no_samples() -> None:
    h, weight = normal(0, M), normal(N, M)
    indices, values = encode(h, weight, None, K)
    recon = dense.decode(indices, values, weight)
    assert recon.shape == (0, M)
    assert dense.correlate_at(h, indices, weight).shape == (0, K)
    recon.sum().backward()
    assert (weight.grad == 0).all()
