"""Encoders: tied and untied, selection among some features, fresh starts, pursuits and their gradients, rebuilding."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from expander_sae.dictionary import DenseDictionary, Dictionary, ExpanderDictionary
from expander_sae.mask import Mask
from expander_sae.ops import Selection
from expander_sae.pursuit import omp
from expander_sae.sae import ENCODERS, SAE, Encoder, PursuitEncoder, TiedEncoder, TopK, UntiedEncoder
from expander_sae.stored import Section

M, N, D, K = 8, 13, 3, 4
MASK = Mask.build("balanced", d_in=M, d_sae=N, degree=D, seed=2)
CENTER = torch.zeros(M, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(untied: bool) -> tuple[Dictionary, TiedEncoder, Tensor]:
    """A dictionary, an encoder on it, and the dense columns ``(m, n)`` the encoder reads with."""
    dictionary = ExpanderDictionary(MASK, normal(N, D))
    encoder = UntiedEncoder(normal(N, D, seed=9)) if untied else TiedEncoder(N)
    encoder.b_enc = torch.nn.Parameter(normal(N, seed=4))
    return dictionary, encoder, encoder.own(dictionary.matrix()).to_dense().detach()


def again(encoder: Encoder, dictionary: Dictionary, tensors: dict[str, Tensor] | None = None, **change: Any) -> Encoder:
    section = Section(json.loads(json.dumps(encoder.config())) | change, "encoder")
    return section.kind(ENCODERS).from_config(section, tensors or encoder.stored_tensors(), dictionary)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.0])
def test_the_right_columns_are_read(untied: bool, threshold: float | None) -> None:
    dictionary, encoder, w = parts(untied)
    assert encoder.kind == ("untied" if untied else "tied")
    h, center = normal(6, M, seed=1), normal(M, seed=3)
    expected = ((h - center) @ w + encoder.b_enc).topk(K, dim=1)
    code = encoder(dictionary.matrix(), h, center, Selection(K, threshold))
    if threshold is None:
        assert code.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(code.values, expected.values if threshold is None else expected.values.relu())


@pytest.mark.parametrize("untied", [False, True])
def test_code_among_some_features(untied: bool) -> None:
    dictionary, encoder, w = parts(untied)
    h, features = normal(6, M, seed=1), torch.tensor([11, 2, 5, 7, 8])
    expected = (h @ w + encoder.b_enc)[:, features].topk(2, dim=1)
    code = encoder.code_among(features, dictionary.matrix(), h, CENTER, Selection(2))
    assert code.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(code.values, expected.values)


@pytest.mark.parametrize("untied", [False, True])
def test_a_feature_starts_afresh(untied: bool) -> None:
    dictionary, encoder, before = parts(untied)
    bias = encoder.b_enc.detach().clone()
    dictionary.point_at(torch.tensor([1, 4]), normal(2, M, seed=7))
    encoder.reset_features(torch.tensor([1, 4]), dictionary.matrix())
    kept = [j for j in range(N) if j not in (1, 4)]
    assert encoder.b_enc[[1, 4]].tolist() == [0, 0]
    assert torch.equal(encoder.b_enc[kept], bias[kept])
    after = encoder.own(dictionary.matrix()).to_dense()
    torch.testing.assert_close(after[:, [1, 4]], dictionary.to_dense()[:, [1, 4]])
    assert torch.equal(after[:, kept], before[:, kept])


@pytest.mark.parametrize("untied", [False, True])
def test_rebuilt_from_config_and_tensors(untied: bool) -> None:
    dictionary, encoder, _ = parts(untied)
    other = again(encoder, dictionary)
    assert other.config() == encoder.config()
    assert type(other) is type(encoder)
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_what_cannot_be_rebuilt() -> None:
    dictionary, encoder, _ = parts(True)
    good = encoder.stored_tensors()
    cases: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
        ({"kind": "gated"}, good, "unknown encoder 'gated'"),
        ({"kind": 3}, good, "encoder.kind should be a string, it is 3"),
        ({"version": 2}, good, "encoder has version 2, this program reads version 1"),
        ({"colour": 1}, good, "has an entry 'colour' that this program does not know"),
        ({}, good | {"b_enc": torch.zeros(N + 1)}, r"'b_enc' should be floating point of shape \(13,\)"),
        ({}, good | {"values": torch.zeros(N, M)}, r"'values' should be floating point of shape \(13, 3\)"),
        ({}, good | {"values": torch.full((N, D), torch.nan)}, "'values' holds NaN"),
        ({}, {"b_enc": good["b_enc"]}, "the tensor 'values' is missing"),
    ]
    for change, tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            again(encoder, dictionary, tensors, **change)


def test_a_pursuit_is_its_solver_with_the_dictionary_held_still() -> None:
    dictionary, h = ExpanderDictionary(MASK, normal(N, D)), normal(6, M, seed=1)
    encoder = PursuitEncoder("omp", {"block": 2})
    code = encoder(dictionary.matrix(), h, CENTER, Selection(K))
    expected = omp(h, dictionary.matrix().detach(), K, block=2)
    assert torch.equal(code.indices, expected.indices)
    assert torch.equal(code.values, expected.values)
    assert torch.equal(code.residual_norms, expected.residual_norms)  # type: ignore[attr-defined]
    assert not code.values.requires_grad
    assert not list(encoder.parameters())
    assert not encoder.ranks_features
    assert again(encoder, dictionary).config() == encoder.config()


def test_a_pursuit_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="unknown solver 'ompp'; did you mean 'omp'"):
        PursuitEncoder("ompp")
    with pytest.raises(ValueError, match="solver 'omp' has no option 'rounds'; it takes"):
        PursuitEncoder("omp", {"rounds": 3})
    matrix = ExpanderDictionary(MASK).matrix()
    with pytest.raises(ValueError, match="set aux_k=0"):
        PursuitEncoder("omp").code_among(torch.arange(3), matrix, normal(2, M), CENTER, Selection(2))


@pytest.mark.parametrize("rule", [TopK(N, K, relu=True), TopK(N, K, rank="magnitude")])
def test_a_pursuit_takes_a_number_of_features_only(rule: TopK) -> None:
    with pytest.raises(ValueError, match="give the pursuit nonnegative=True"):
        SAE(ExpanderDictionary(MASK), PursuitEncoder("omp"), rule)


@pytest.mark.parametrize("solver", ["omp", "matching-pursuit", "ols"])
@pytest.mark.parametrize("kind", ["expander", "dense"])
def test_gradients_reach_the_activations_on_the_fixed_support(solver: str, kind: str) -> None:
    dictionary = ExpanderDictionary(MASK, normal(N, D)) if kind == "expander" else DenseDictionary(normal(N, M))
    sae = SAE(dictionary, PursuitEncoder(solver), TopK(N, K)).double()
    with torch.no_grad():
        sae.b_dec.copy_(normal(M, seed=5))
    h = normal(5, M, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(sae, h)
    assert torch.autograd.gradcheck(lambda h: sae.encode(h).values, h)
    for parameter in sae.parameters():  # as without a gradient to the activations: through the decoder alone
        parameter.grad = None
    (sae(h.detach()) - 1).square().sum().backward()
    plain = [parameter.grad for parameter in sae.parameters()]
    for parameter in sae.parameters():
        parameter.grad = None
    (sae(h) - 1).square().sum().backward()
    for parameter, expected in zip(sae.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_a_pursuit_without_a_fit_has_no_such_gradient_and_says_so() -> None:
    sae = SAE.expander(MASK, K).with_encoder("matching-pursuit", refit=False).double()
    h = normal(5, M, seed=1)
    sae(h)
    with pytest.raises(ValueError, match="its coefficients are not the least-squares ones"):
        sae(h.requires_grad_())
