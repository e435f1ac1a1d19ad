"""The fused training step against the composed operators: error, residual, code and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expander_sae.mask import Mask
from expander_sae.ops import Selection, cpu
from expander_sae.ops.fused import tied_error

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="the C++ kernels are not built")


@needs_kernels
@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 70),
    d_in=st.integers(1, 40),
    d_sae=st.integers(1, 90),
    relu=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_fused_equals_composed(
    batch: int, d_in: int, d_sae: int, relu: bool, dtype: torch.dtype, data: st.DataObject
) -> None:
    degree, k = data.draw(st.integers(1, d_in)), data.draw(st.integers(1, d_sae))
    rows = Mask.build("left-regular", d_in=d_in, d_sae=d_sae, degree=degree).rows
    generator = torch.Generator().manual_seed(d_in + 41 * d_sae)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    h, inputs = draw(batch, d_in), [draw(d_sae, degree), draw(d_sae), draw(d_in)]
    results = []
    for backend in ("cpu", "reference"):
        values, b_enc, b_dec = (tensor.clone().requires_grad_() for tensor in inputs)
        found = tied_error(h, rows, values, b_enc, b_dec, Selection(k, 0.0 if relu else None), backend=backend)
        gradients = torch.autograd.grad(3 * found.error, (values, b_enc, b_dec))
        assert not found.residual.requires_grad
        assert not found.code.values.requires_grad
        results.append((found.error.detach(), found.residual, found.code.to_dense(d_sae), *gradients))
    # Gaussian scores are distinct, so that both select the same features.
    torch.testing.assert_close(*results, rtol=2e-4 if dtype == torch.float32 else 1e-9, atol=2e-4)


@needs_kernels
def test_errors_reach_the_caller() -> None:
    rows = Mask.build("left-regular", d_in=6, d_sae=9, degree=2).rows
    with pytest.raises(ValueError, match="k must be between 1 and d_sae = 9"):
        tied_error(torch.randn(3, 6), rows, torch.randn(9, 2), torch.zeros(9), torch.zeros(6), Selection(10))
    selection = Selection(2, torch.zeros(1))
    with pytest.raises(ValueError, match=r"threshold must have shape \(9,\)"):
        tied_error(torch.randn(3, 6), rows, torch.randn(9, 2), torch.zeros(9), torch.zeros(6), selection)
