"""The exact dictionary update against one dense least-squares problem over all unknowns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expander_sae.data.sources import TensorSource
from expander_sae.dictionary import unit_rows
from expander_sae.mask import Mask
from expander_sae.ops import SparseCode
from expander_sae.sae import SAE
from expander_sae.training.exact import alternate, refit_dictionary

M, N, D, K = 6, 11, 3, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(kind: str, *, unit_norm: bool = False, seed: int = 0, encoder: str = "omp", k: int = K) -> SAE:
    if kind == "dense":
        sae = SAE.dense(M, N, k=k, unit_norm=unit_norm, seed=seed)
    else:
        mask = Mask.build("left-regular", d_in=M, d_sae=N, degree=D, seed=seed)
        sae = SAE.expander(mask, k, unit_norm=unit_norm, seed=seed)
    sae = (sae if encoder == "tied" else sae.with_encoder(encoder)).double()
    with torch.no_grad():
        sae.b_dec.copy_(normal(M, seed=seed + 50))
    return sae


def lstsq(sae: SAE, h: Tensor, code: SparseCode, ridge: float) -> tuple[Tensor, Tensor]:
    """``W (m, n)`` and ``b`` by ordinary least squares in every unknown at once, the ridge as extra equations."""
    x = code.to_dense(N)
    old, support = sae.dictionary.to_dense(), sae.dictionary.to_dense() != 0
    used = (x != 0).any(dim=0)
    weight = (ridge * x.square().sum(dim=0)[used].mean()).sqrt()
    w, b = old.clone(), sae.b_dec.detach().clone()
    for i in range(M):  # rows share no unknown: this is the whole problem
        columns = support[i].nonzero().squeeze(1)
        system = torch.cat([x[:, columns], torch.ones(len(x), 1)], dim=1)
        prior = torch.cat([weight * torch.eye(len(columns)), torch.zeros(len(columns), 1)], dim=1)
        right = torch.cat([h[:, i], weight * old[i, columns]])
        solution = torch.linalg.lstsq(torch.cat([system, prior]), right.unsqueeze(1)).solution.squeeze(1)
        w[i, columns], b[i] = solution[:-1], solution[-1]
    return w, b


@pytest.mark.parametrize("kind", ["expander", "dense"])
@pytest.mark.parametrize("encoder", ["omp", "tied", "matching-pursuit"])
@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    samples=st.integers(2, 40),
    batch_size=st.integers(1, 17),
    ridge=st.sampled_from([1e-6, 1e-2, 1.0]),
)
def test_it_is_the_least_squares_solution(
    kind: str, encoder: str, seed: int, samples: int, batch_size: int, ridge: float
) -> None:
    sae, h = made(kind, seed=seed, encoder=encoder), normal(samples, M, seed=seed + 1)
    if encoder == "tied" and kind == "expander":
        sae.sparsity.relu = True  # type: ignore[assignment]
    code = sae.encode(h)
    w, b = lstsq(sae, h, code, ridge)
    update = refit_dictionary(sae, TensorSource(h), batch_size=batch_size, ridge=ridge)
    torch.testing.assert_close(sae.dictionary.to_dense(), w, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sae.b_dec.detach(), b, rtol=1e-6, atol=1e-7)
    assert update.rows == samples
    assert update.fires.tolist() == (code.to_dense(N) != 0).sum(dim=0).tolist()
    assert bool((update.scales == 1).all())


@pytest.mark.parametrize("kind", ["expander", "dense"])
def test_unit_norm_columns_and_what_it_means_for_the_codes(kind: str) -> None:
    free, bound, h = made(kind), made(kind, unit_norm=True), normal(200, M, seed=3)
    with torch.no_grad():
        free.dictionary.values.copy_(unit_rows(bound.dictionary.values))
        free.b_dec.copy_(bound.b_dec)
    code = bound.encode(h)
    source = TensorSource(h)
    refit_dictionary(free, source, batch_size=50)
    update = refit_dictionary(bound, source, batch_size=50)
    torch.testing.assert_close(bound.dictionary.to_dense() * update.scales, free.dictionary.to_dense())
    torch.testing.assert_close(bound.dictionary.values.norm(dim=1), torch.ones(N, dtype=torch.float64))
    scaled = SparseCode(code.indices, code.values * update.scales[code.indices.long()])
    torch.testing.assert_close(bound.decode(scaled), free.decode(code))


@pytest.mark.parametrize("kind", ["expander", "dense"])
def test_the_error_of_pursuit_codes_falls(kind: str) -> None:
    sae = made(kind, unit_norm=True, k=2)
    source = TensorSource(normal(2000, 4, seed=1) @ normal(4, M, seed=2) + normal(M, seed=9))
    h = source.rows(slice(None))
    errors = [float((h - sae(h)).square().sum().detach())]
    for step in range(3):
        refit_dictionary(sae, source, rows=1500, batch_size=500, seed=4, start_step=3 * step)
        errors.append(float((h - sae(h)).square().sum().detach()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_alternation_learns_and_uses_every_feature() -> None:
    sae = made("expander", unit_norm=True, k=2)
    with torch.no_grad():  # two features that nothing selects
        sae.dictionary.values[[3, 7]] = 0
    source = TensorSource(normal(4000, 4, seed=1) @ normal(4, M, seed=2))
    before = float((source.rows(slice(None)) - sae(source.rows(slice(None)))).square().sum().detach())
    updates = list(alternate(sae, source, 4, rows=1000, batch_size=300, resample_below=1))
    assert [update.rows for update in updates] == [1000] * 4
    assert updates[0].fires[[3, 7]].tolist() == [0, 0]
    assert bool((updates[-1].fires[[3, 7]] > 0).all())
    after = float((source.rows(slice(None)) - sae(source.rows(slice(None)))).square().sum().detach())
    assert after < 0.5 * before


def test_features_without_a_fire_stay_and_rows_without_a_column_get_the_mean() -> None:
    rows = torch.tensor([[0, 1], [1, 2], [0, 2]])
    sae = SAE.expander(Mask.from_rows(rows, d_in=4), 1).with_encoder("omp").double()
    with torch.no_grad():
        sae.dictionary.values.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    h = torch.tensor([[2.0, 0.1, 0.0, 5.0], [3.0, -0.1, 0.0, 7.0]], dtype=torch.float64)  # feature 0 both times
    update = refit_dictionary(sae, TensorSource(h), batch_size=2)
    assert update.fires.tolist() == [2, 0, 0]
    assert sae.dictionary.values[1:].tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert float(sae.b_dec[3].detach()) == pytest.approx(6.0)


def test_no_fire_at_all() -> None:
    sae = SAE.expander(Mask.build("left-regular", d_in=M, d_sae=N, degree=D), K).with_encoder("omp")
    before = sae.dictionary.to_dense()
    update = refit_dictionary(sae, TensorSource(torch.zeros(5, M)), batch_size=5)
    torch.testing.assert_close(sae.dictionary.to_dense(), before)
    assert not bool(update.fires.any())


def test_which_rows() -> None:
    h = normal(100, M, seed=3)
    twin, sae = made("expander"), made("expander")
    order = list(zip(TensorSource(h).batches(30, 5, 2), range(2), strict=False))
    refit_dictionary(twin, TensorSource(torch.cat([batch for batch, _ in order])[:40]), batch_size=40)
    update = refit_dictionary(sae, TensorSource(h), rows=40, batch_size=30, seed=5, start_step=2)
    assert update.rows == 40
    torch.testing.assert_close(sae.dictionary.to_dense(), twin.dictionary.to_dense())


def test_float32_and_many_batches_agree_with_one() -> None:
    h = normal(4000, M, seed=3).float()
    one, many = made("expander", unit_norm=True).float(), made("expander", unit_norm=True).float()
    refit_dictionary(one, TensorSource(h), batch_size=4000)
    refit_dictionary(many, TensorSource(h), batch_size=100)
    torch.testing.assert_close(one.dictionary.to_dense(), many.dictionary.to_dense(), rtol=1e-4, atol=1e-4)


def test_bad_arguments() -> None:
    sae = made("expander")
    with pytest.raises(ValueError, match="the activations have width 5, the SAE reads d_in = 6"):
        refit_dictionary(sae, TensorSource(normal(4, M - 1)))
    for ridge in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ridge must be positive"):
            refit_dictionary(sae, TensorSource(normal(4, M)), ridge=ridge)
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        refit_dictionary(sae, TensorSource(normal(4, M)), rows=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        refit_dictionary(sae, TensorSource(normal(4, M)), batch_size=0)
