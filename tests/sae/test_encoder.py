"""Encoders: tied and untied TopK, selection among some features, fresh starts, rebuilding."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from expander_sae.dictionary import DenseDictionary, ExpanderDictionary
from expander_sae.mask import Mask
from expander_sae.pursuit import omp
from expander_sae.sae.encoder import PursuitEncoder, TopKEncoder, encoder_from

M, N, D, K = 8, 13, 3, 4
MASK = Mask.build("balanced", d_in=M, d_sae=N, degree=D, seed=2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encoder(untied: bool, **options) -> TopKEncoder:
    own = DenseDictionary(normal(N, M, seed=9), unit_norm=False) if untied else None
    made = TopKEncoder(N, K, own=own, **options)
    made.b_enc = torch.nn.Parameter(normal(N, seed=4))
    return made


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_topk_of_the_right_columns(untied: bool, relu: bool) -> None:
    matrix = ExpanderDictionary(MASK, normal(N, D)).matrix()
    made = encoder(untied, relu=relu)
    assert made.kind == ("untied" if untied else "tied")
    h = normal(6, M, seed=1)
    w = normal(N, M, seed=9).T if untied else matrix.to_dense().detach()
    expected = (h @ w + made.b_enc).topk(K, dim=1)
    code = made(matrix, h)
    assert code.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(code.values, expected.values.relu() if relu else expected.values)


@pytest.mark.parametrize("untied", [False, True])
def test_code_among_some_features(untied: bool) -> None:
    matrix = ExpanderDictionary(MASK, normal(N, D)).matrix()
    made, h = encoder(untied), normal(6, M, seed=1)
    features = torch.tensor([11, 2, 5, 7, 8])
    w = normal(N, M, seed=9).T if untied else matrix.to_dense().detach()
    expected = (h @ w + made.b_enc)[:, features].topk(2, dim=1)
    code = made.code_among(features, matrix, h, 2)
    assert code.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(code.values, expected.values)


@pytest.mark.parametrize("untied", [False, True])
def test_a_feature_starts_afresh(untied: bool) -> None:
    matrix = DenseDictionary(normal(N, M)).matrix()
    made = encoder(untied)
    bias = made.b_enc.detach().clone()
    own = made.own.to_dense() if made.own is not None else None
    made.reset_features(torch.tensor([1, 4]), matrix)
    kept = [j for j in range(N) if j not in (1, 4)]
    assert made.b_enc[[1, 4]].tolist() == [0, 0]
    assert torch.equal(made.b_enc[kept], bias[kept])
    if made.own is not None:
        torch.testing.assert_close(made.own.to_dense()[:, [1, 4]], matrix.to_dense()[:, [1, 4]])
        assert torch.equal(made.own.to_dense()[:, kept], own[:, kept])


@pytest.mark.parametrize("untied", [False, True])
def test_rebuilt_from_config_and_tensors(untied: bool) -> None:
    made = encoder(untied, relu=True)
    again = encoder_from(json.loads(json.dumps(made.config())), made.stored_tensors(), M, N)
    assert again.config() == made.config()
    assert {name: t.tolist() for name, t in again.state_dict().items()} == {
        name: t.tolist() for name, t in made.state_dict().items()
    }
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("k", [0, -3, N + 1])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be between 1 and d_sae = {N}, got {k}"):
        TopKEncoder(N, k)


def test_k_is_an_integer_and_stays_json() -> None:
    assert json.dumps(TopKEncoder(N, np.int64(3)).config())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="integer"):
        TopKEncoder(N, 3.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "gated"}, "unknown encoder 'gated' with sparsity 'topk'"),
        ({"sparsity": "jumprelu"}, "unknown encoder 'tied' with sparsity 'jumprelu'"),
        ({"k": N + 1}, "k must be between 1"),
    ],
)
def test_what_cannot_be_rebuilt(change: dict, message: str) -> None:
    made = encoder(False)
    with pytest.raises(ValueError, match=message):
        encoder_from(made.config() | change, made.stored_tensors(), M, N)


def test_bad_tensors() -> None:
    with pytest.raises(ValueError, match="b_enc should have shape"):
        encoder_from(encoder(False).config(), {"b_enc": torch.zeros(N + 1)}, M, N)
    with pytest.raises(ValueError, match="the encoder lacks 'b_enc'"):
        encoder_from(encoder(False).config(), {}, M, N)
    with pytest.raises(ValueError, match="the dense dictionary lacks 'weight'"):
        encoder_from(encoder(True).config(), {"b_enc": torch.zeros(N)}, M, N)


def test_a_pursuit_is_its_solver_with_the_dictionary_held_still() -> None:
    dictionary, h = ExpanderDictionary(MASK, normal(N, D)), normal(6, M, seed=1)
    made = PursuitEncoder(N, K, "omp", {"block": 2})
    code = made(dictionary.matrix(), h)
    expected = omp(h, dictionary.matrix().detach(), K, block=2)
    assert torch.equal(code.indices, expected.indices)
    assert torch.equal(code.values, expected.values)
    assert not code.values.requires_grad
    assert not list(made.parameters())
    assert made.own is None
    again = encoder_from(json.loads(json.dumps(made.config())), made.stored_tensors(), M, N)
    assert again.config() == made.config()


def test_a_pursuit_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="unknown solver 'ompp'; choose one of 'omp'"):
        PursuitEncoder(N, K, "ompp")
    with pytest.raises(ValueError, match="solver 'omp' has no option 'rounds'; it takes"):
        PursuitEncoder(N, K, "omp", {"rounds": 3})
    with pytest.raises(ValueError, match="k must be between 1"):
        PursuitEncoder(N, 0, "omp")
    with pytest.raises(ValueError, match="set aux_k=0"):
        PursuitEncoder(N, K, "omp").code_among(torch.arange(3), ExpanderDictionary(MASK).matrix(), normal(2, M), 2)
