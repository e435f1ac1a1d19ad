"""What users hand to a solver: numbers and arrays of NumPy, an SAE, tensors in inference mode and functional calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.pursuit import expander, gaussian

from expander_sae import pursuit
from expander_sae.mask import Mask
from expander_sae.sae import SAE


def test_numpy_numbers_and_arrays() -> None:
    matrix, h = expander(), gaussian(6)
    expected = pursuit.omp(h, matrix, 5)
    for found in (pursuit.omp(h.numpy(), matrix, np.int64(5)), pursuit.omp(h, matrix, np.int32(5), block=np.int64(1))):
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.values, expected.values)
    fast, h32 = expander(dtype=torch.float32), h.float()
    assert torch.equal(
        pursuit.matching_pursuit(h32.numpy(), fast, np.int64(5)).indices, pursuit.matching_pursuit(h32, fast, 5).indices
    )


def test_an_sae_is_refused_with_what_to_write_instead() -> None:
    sae = SAE.expander(Mask.build("balanced", d_in=8, d_sae=20, degree=3), 3)
    with pytest.raises(TypeError, match=r"got SAE; of an SAE give sae.dictionary together with b_dec=sae.b_dec"):
        pursuit.omp(torch.randn(2, 8), sae, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"of a dense array DenseMatrix\(array.T\)"):
        pursuit.omp(torch.randn(2, 8), torch.randn(8, 20), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["expander", "dense"])
@pytest.mark.parametrize("reader", ["own", "omp", "mp-unrolled"])
def test_inference_mode_and_functional_calls_of_an_sae(kind: str, reader: str) -> None:
    mask = Mask.build("balanced", d_in=8, d_sae=20, degree=3)
    sae = SAE.expander(mask, 3) if kind == "expander" else SAE.dense(8, 20, k=3, untied=True)
    sae = sae if reader == "own" else sae.with_encoder(reader)
    h = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(sae(h), sae(h.clone()))
    state = {name: value.detach() for name, value in sae.named_parameters()}
    state["b_dec"] = state["b_dec"] + 0.25

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return (torch.func.functional_call(sae, parameters, (h,)) - h).square().sum()

    gradients = torch.autograd.grad(
        loss(moved := {name: value.requires_grad_() for name, value in state.items()}),
        list(moved.values()),
        allow_unused=True,
    )
    with torch.no_grad():
        sae.b_dec += 0.25
    (sae(h) - h).square().sum().backward()
    for (name, parameter), found in zip(sae.named_parameters(), gradients, strict=True):
        expected = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(torch.zeros_like(parameter) if found is None else found, expected, msg=name)
