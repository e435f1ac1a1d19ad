"""SAEs under ``torch.func``: the gradients are those of plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad

from expander_sae.mask import Mask
from expander_sae.sae import SAE

M, N, K = 16, 40, 4


@pytest.mark.parametrize("kind", ["expander", "dense"])
@pytest.mark.parametrize("encoder", ["tied", "omp", "mp-unrolled"])
def test_functional_call(kind: str, encoder: str) -> None:
    torch.manual_seed(0)
    mask = Mask.build("left-regular", d_in=M, d_sae=N, degree=3, seed=1)
    sae = SAE.expander(mask, K) if kind == "expander" else SAE.dense(M, N, k=K)
    if encoder != "tied":
        sae = sae.with_encoder(encoder)
    h = torch.randn(6, M)
    parameters = {name: tensor.detach() for name, tensor in sae.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return (functional_call(sae, given, (h,)) - h).square().sum()

    found = grad(loss)(parameters)
    assert bool((next(iter(found.values())) != 0).any())
    (sae(h) - h).square().sum().backward()
    for name, parameter in sae.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], expected)

    (by_activation,) = torch.autograd.grad(sae(h.requires_grad_()).square().sum(), h)
    torch.testing.assert_close(grad(lambda given: sae(given).square().sum())(h.detach()), by_activation)
