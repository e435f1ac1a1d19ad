"""Activations in another basis: what is refused, what is kept, and that nothing but the coordinates changes."""

from __future__ import annotations

import pytest
import torch

from expander_sae.data import RotatedSource, TensorSource, principal_axes, random_rotation

WIDTH = 8


def rows(count: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, WIDTH, generator=generator) * torch.arange(1, WIDTH + 1) + 3


def test_rows_are_rotated_in_the_order_of_the_source() -> None:
    source, rotation = TensorSource(rows()), random_rotation(WIDTH, 1)
    turned = RotatedSource(source, rotation)
    assert (len(turned), turned.d_in) == (50, WIDTH)
    torch.testing.assert_close(turned.rows([3, 1]), source.rows([3, 1]) @ rotation)
    torch.testing.assert_close(turned.rows([3, 1]) @ rotation.T, source.rows([3, 1]))
    batches = zip(turned.batches(10, 5), source.batches(10, 5), strict=False)
    for _ in range(7):
        mine, theirs = next(batches)
        torch.testing.assert_close(mine, theirs @ rotation)


def test_the_origin_tells_bases_apart() -> None:
    source = TensorSource(rows())
    origins = [RotatedSource(source, random_rotation(WIDTH, seed)).origin() for seed in (0, 0, 1)]
    assert origins[0] == origins[1]
    assert origins[0] != origins[2]
    assert origins[0]["rows"] == 50


def test_what_is_no_rotation_is_refused() -> None:
    source = TensorSource(rows())
    with pytest.raises(ValueError, match=r"has shape \(8, 8\)"):
        RotatedSource(source, torch.eye(WIDTH - 1))
    with pytest.raises(ValueError, match="not orthogonal"):
        RotatedSource(source, torch.eye(WIDTH) * 1.001)
    with pytest.raises(ValueError, match="not orthogonal"):
        RotatedSource(source, torch.full((WIDTH, WIDTH), torch.nan))


def test_random_rotations_are_uniform() -> None:
    drawn = torch.stack([random_rotation(3, seed) for seed in range(400)])
    assert drawn.mean(dim=0).abs().max() < 0.1  # QR without its signs has a mean of ±½ on the diagonal
    torch.testing.assert_close(drawn.square().mean(dim=0), torch.full((3, 3), 1 / 3), atol=0.05, rtol=0)


def test_principal_axes_decorrelate_and_fall() -> None:
    h = rows(400)
    axes, variances = principal_axes(h)
    covariance = torch.cov(((h.double() - h.double().mean(dim=0)) @ axes.double()).T, correction=0)
    torch.testing.assert_close(covariance.diagonal(), variances, rtol=1e-4, atol=1e-4)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-3
    assert variances.tolist() == sorted(variances.tolist(), reverse=True)
    RotatedSource(TensorSource(h), axes)
