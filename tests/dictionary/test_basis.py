"""Dictionaries in a basis of their own: the map is ``R·A``, and all else is as on rotated activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.training import MODERN, PAPER, QUICK, M, N, activations, expander, interrupted, same, state
from torch import Tensor

from expander_sae.data import TensorSource
from expander_sae.dictionary import DenseMatrix, OrthogonalBasis, RotatedMatrix
from expander_sae.dictionary.basis import STANDARD
from expander_sae.evaluation.metrics import reconstruction
from expander_sae.ops import Selection, SparseCode
from expander_sae.pursuit import omp
from expander_sae.sae import SAE, SAEConfig, SAEFolderError
from expander_sae.training import Stopped, TrainConfig, build_sae, load_sae, train
from expander_sae.training.exact import refit_dictionary
from expander_sae.training.start import covariance_of, principal_axes

BASIS = OrthogonalBasis.random(M, seed=3)


def rotated(h: Tensor) -> Tensor:
    return h @ BASIS.matrix().to(h.dtype)


def wide(sae: SAE, h: Tensor) -> tuple[SAE, Tensor]:
    return sae.double(), h.double()


def in_basis(**options: Any) -> SAE:
    """An SAE of vectors; ``expander(**options)`` is that of their coordinates."""
    sae = expander(**options)
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-1, 1, M))
    sae.enter_basis_(OrthogonalBasis(BASIS.matrix()))
    return sae


def plain(**options: Any) -> SAE:
    sae = expander(**options)
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-1, 1, M))
    return sae


def test_the_matrix_is_the_product() -> None:
    core = expander().dictionary.core().detach()
    core = core.with_values(core.values.double())
    basis = OrthogonalBasis(torch.linalg.qr(torch.randn(M, M, dtype=torch.float64))[0])
    w = RotatedMatrix(core, basis)
    dense = basis.matrix() @ core.to_dense()
    other = DenseMatrix(dense.T.contiguous())
    h, features = torch.randn(5, M, dtype=torch.float64), torch.tensor([3, 0, 7])
    indices = torch.tensor([[1, 2, 5]] * 5, dtype=torch.int32)
    code = SparseCode(indices, torch.randn(5, 3, dtype=torch.float64))
    pairs: list[tuple[Tensor, Tensor]] = [
        (w.to_dense(), dense),
        (w.correlate(h), h @ dense),
        (w.decode(code), other.decode(code)),
        (w.correlate_at(h, indices), other.correlate_at(h, indices)),
        (w.gram(indices), other.gram(indices)),
        (w.columns(features), other.columns(features)),
        (w.norms(), other.norms()),
        (w.subset(features).to_dense(), dense[:, features]),
        (w.with_values(core.values * 2).to_dense(), dense * 2),
        (w.synthesis()(torch.eye(N, dtype=torch.float64)), dense.T),
        (w.unit(torch.float64)[0].to_dense(), dense / dense.norm(dim=0)),
    ]
    for mine, expected in pairs:
        torch.testing.assert_close(mine, expected)
    selection = Selection(4, 0.0)
    torch.testing.assert_close(
        w.select(h, None, selection, center=h[0]).to_dense(N), other.select(h, None, selection, center=h[0]).to_dense(N)
    )


@pytest.mark.parametrize("encoder", ["tied", "untied", "omp", "matching-pursuit", "mp-unrolled"])
def test_codes_are_those_of_rotated_activations(encoder: str) -> None:
    one, other = in_basis(untied=encoder == "untied"), plain(untied=encoder == "untied")
    if encoder not in ("tied", "untied"):
        one, other = one.with_encoder(encoder), other.with_encoder(encoder)
    one, h = wide(one, activations(50))
    other = other.double()
    found, expected = one.encode(h), other.encode(one.dictionary.coordinates(h))
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.values, expected.values)
    assert one.dictionary.basis is not None
    torch.testing.assert_close(one.decode(found), one.dictionary.basis.vectors(other.decode(expected)))
    torch.testing.assert_close(one(h), one.decode(found))


def test_a_solver_called_directly_reads_the_product() -> None:
    sae, h = wide(in_basis(), activations(20))
    code = omp(h, sae.dictionary, 3, b_dec=sae.b_dec)
    dense = omp(h, DenseMatrix(sae.dictionary.to_dense().T.contiguous()), 3, b_dec=sae.b_dec)
    torch.testing.assert_close(code.to_dense(N), dense.to_dense(N))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(0, 99))
def test_a_random_basis_is_orthogonal_and_goes_both_ways(d_in: int, seed: int) -> None:
    basis = OrthogonalBasis.random(d_in, seed)
    h = torch.randn(3, d_in, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(basis.vectors(basis.coordinates(h)), h)
    torch.testing.assert_close(basis.coordinates(h).norm(dim=1), h.norm(dim=1))


def test_random_bases_are_uniform() -> None:
    drawn = torch.stack([OrthogonalBasis.random(3, seed).matrix() for seed in range(400)])
    assert float(drawn.mean(dim=0).abs().max()) < 0.1  # QR without its signs has a mean of ±½ on the diagonal
    torch.testing.assert_close(drawn.square().mean(dim=0), torch.full((3, 3), 1 / 3), atol=0.05, rtol=0)


@pytest.mark.parametrize("bad", [torch.ones(3, 3), torch.eye(3)[:2], torch.eye(3) * 1.001, torch.eye(2) * torch.nan])
def test_what_is_no_basis(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"a basis is a square matrix|not orthogonal"):
        OrthogonalBasis(bad)


def test_entering_and_leaving() -> None:
    sae = in_basis()
    with pytest.raises(ValueError, match="has a basis"):
        sae.enter_basis_(BASIS)
    assert sae.leave_basis_() is not None
    assert sae.leave_basis_() is None
    torch.testing.assert_close(sae.b_dec, torch.linspace(-1, 1, M))
    with pytest.raises(ValueError, match="does not fit an SAE that reads d_in = 12"):
        sae.enter_basis_(OrthogonalBasis.random(M + 1))


def test_the_folder_keeps_it_and_it_is_counted(tmp_path: Path) -> None:
    sae, h = in_basis(), activations(20)
    assert sae.num_values == plain().num_values + M * M
    assert sae.num_bytes == plain().num_bytes + 4 * M * M
    assert sae.dictionary.num_bytes == plain().dictionary.num_bytes + 4 * M * M
    sae.save_pretrained(tmp_path / "sae")
    again = SAE.from_pretrained(tmp_path / "sae")
    assert same(state(sae), state(again))
    assert torch.equal(again.encode(h).values, sae.encode(h).values)
    for dtype in (torch.bfloat16, torch.float64):
        again.to(dtype).save_pretrained(tmp_path / "other")
        assert SAE.from_pretrained(tmp_path / "other").dtype == dtype
    assert again.config()["dictionary"]["basis"] == {"kind": "orthogonal", "version": 1, "origin": "given"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, tensors: tensors["basis.entries"].mul_(1.5), "not orthogonal"),
        (lambda config, tensors: tensors.pop("basis.entries"), "'basis.entries' is missing"),
        (
            lambda config, tensors: config["dictionary"].update(basis=STANDARD),
            "belongs to no",
        ),
        (lambda config, tensors: config["dictionary"]["basis"].update(kind="butterfly"), "butterfly"),
        (lambda config, tensors: config["dictionary"]["basis"].update(version=2), "version 2"),
    ],
)
def test_a_basis_that_was_changed_is_refused(change: Callable[[dict, dict], Any], message: str, tmp_path: Path) -> None:
    from expander_sae.sae import folder

    in_basis().save_pretrained(tmp_path)
    config, tensors = folder.read(tmp_path)
    change(config, tensors)
    folder.write(tmp_path, config, tensors)
    with pytest.raises(SAEFolderError, match=message):
        SAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [QUICK, MODERN, PAPER], ids=["quick", "modern", "paper"])
def test_training_is_that_of_rotated_activations(config: TrainConfig) -> None:
    h = activations(dtype=torch.float64)
    one, other = in_basis().double(), plain().double()
    assert one.dictionary.basis is not None
    coordinates = one.dictionary.coordinates(h)
    train(one, TensorSource(h), config)
    train(other, TensorSource(coordinates), config)
    torch.testing.assert_close(one.dictionary.values, other.dictionary.values)
    torch.testing.assert_close(one.dictionary.coordinates(one.b_dec), other.b_dec)
    assert reconstruction(one, TensorSource(h)).fvu == pytest.approx(
        reconstruction(other, TensorSource(coordinates)).fvu
    )


def test_a_run_in_a_basis_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = in_basis()
    train(whole, TensorSource(activations()), MODERN, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(in_basis(), interrupted(17), MODERN, tmp_path / "cut")
    partial = load_sae(tmp_path / "cut")
    assert partial.dictionary.basis is not None
    assert reconstruction(partial, TensorSource(activations())).fvu < 1
    resumed = in_basis()
    train(resumed, TensorSource(activations()), MODERN, tmp_path / "cut")
    assert same(state(resumed), state(whole))

    another = expander()
    another.enter_basis_(OrthogonalBasis.random(M, seed=4))
    with pytest.raises(ValueError, match="basis"):
        train(another, TensorSource(activations()), replace(MODERN, steps=60), tmp_path / "cut")


def test_the_exact_update_works_in_the_basis() -> None:
    h = activations(dtype=torch.float64)
    one, other = in_basis().double().with_encoder("omp"), plain().double().with_encoder("omp")
    coordinates = one.dictionary.coordinates(h)
    refit_dictionary(one, TensorSource(h))
    refit_dictionary(other, TensorSource(coordinates))
    torch.testing.assert_close(one.dictionary.values, other.dictionary.values)
    torch.testing.assert_close(one.dictionary.coordinates(one.b_dec), other.b_dec)


def test_principal_axes() -> None:
    scales = torch.linspace(3, 0.5, M)
    h = (torch.randn(4000, M, generator=torch.Generator().manual_seed(0)) * scales) @ BASIS.matrix().T + 7
    whole = covariance_of(TensorSource(h))
    torch.testing.assert_close(whole, torch.cov(h.double().T, correction=0))
    basis = principal_axes(whole)
    covariance = torch.cov(basis.coordinates(h.double()).T, correction=0)
    assert float((covariance - covariance.diagonal().diag()).abs().max()) < 1e-4
    assert bool((covariance.diagonal().diff() <= 0).all())
    peaks = basis.matrix().gather(0, basis.matrix().abs().argmax(dim=0, keepdim=True))
    assert bool((peaks > 0).all())


@pytest.mark.parametrize("kind", ["standard", "random", "pca"])
def test_a_configuration_names_its_basis(kind: Any) -> None:
    sae = build_sae(SAEConfig(d_sae=N, k=3, degree=4, basis=kind), TensorSource(activations()))
    found = sae.dictionary.config()["basis"]
    assert found.get("origin", found["kind"]) == kind
