"""Every metric where its value is known: mean predictor, identity, zeros, large means; and in a language model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expander_sae.data import TensorSource
from expander_sae.dictionary import OrthogonalBasis
from expander_sae.evaluation import (
    ReconstructionMeter,
    ce_recovered,
    evaluate_in_model,
    evaluation_rows,
    reconstruction,
)
from expander_sae.lm import LanguageModel, residual, splice
from expander_sae.mask import Mask
from expander_sae.ops import SparseCode
from expander_sae.sae import SAE

WIDTH, LAYERS, VOCAB, WINDOW = 32, 3, 24, 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def code_of(values: Tensor) -> SparseCode:
    return SparseCode(torch.arange(values.shape[1], dtype=torch.int32).expand(values.shape), values)


def measure(h: Tensor, recon: Tensor, code: SparseCode | None = None, splits: list[int] | None = None):
    code = code or code_of(torch.ones(len(h), 2))
    meter = ReconstructionMeter(5)
    edges = [0, *sorted(splits or []), len(h)]
    for start, stop in itertools.pairwise(edges):
        meter.add(h[start:stop], recon[start:stop], SparseCode(code.indices[start:stop], code.values[start:stop]))
    return meter.result()


def test_the_mean_predictor_scores_one() -> None:
    h = normal(50, 4) + 7
    assert measure(h, h.mean(dim=0).expand_as(h)).fvu == pytest.approx(1, abs=1e-12)


def test_the_identity_scores_zero() -> None:
    h = normal(50, 4)
    result = measure(h, h.clone())
    assert (result.fvu, result.relative_error) == (0, 0)


def test_zeros_score_one_in_relative_error() -> None:
    h = normal(50, 4) + 7
    result = measure(h, torch.zeros_like(h))
    assert result.relative_error == pytest.approx(1, abs=1e-12)
    assert result.fvu == pytest.approx(float(h.square().sum() / (h - h.mean(dim=0)).square().sum()))
    assert result.fvu > 10  # uncentred energy: a large mean makes zeros a bad guess


def test_relative_error_is_the_mean_of_ratios_not_the_ratio_of_means() -> None:
    h = torch.tensor([[1.0, 0.0], [0.0, 100.0]])
    recon = torch.tensor([[0.0, 0.0], [0.0, 75.0]])
    assert measure(h, recon).relative_error == pytest.approx((1 + 0.25) / 2)


def test_zero_vectors_are_left_out_of_the_relative_error() -> None:
    h = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    recon = torch.tensor([[9.0, 0.0], [0.0, 3.0]])
    result = measure(h, recon)
    assert result.relative_error == pytest.approx(0.25)
    assert result.tokens == 2
    assert result.fvu == pytest.approx((81 + 1) / 8)


def test_l0_and_silent_features() -> None:
    code = SparseCode(
        torch.tensor([[0, 1, 2], [1, 4, 2], [0, 0, 0]], dtype=torch.int32),
        torch.tensor([[1.0, -2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    )
    result = measure(normal(3, 4), normal(3, 4), code)
    assert result.l0 == 1
    assert result.silent == 3  # 0 and 1 fired; 2 and 4 were selected with value 0, 3 never


@pytest.mark.parametrize("mean", [0.0, 1e4, 1e8])
def test_a_large_mean_does_not_cancel(mean: float) -> None:
    noise, error = normal(400, 6), 0.1 * normal(400, 6, seed=1)
    h = noise + mean
    expected = float((h + error - h).square().sum() / (h - h.mean(dim=0)).square().sum())
    assert measure(h, h + error, code_of(torch.ones(400, 2)), [100, 350]).fvu == pytest.approx(expected, rel=1e-6)


def test_a_mean_that_drifts_between_batches_counts_as_variance() -> None:
    h = torch.cat([normal(50, 4), normal(50, 4, seed=1) + 1000])
    recon = h + 1
    expected = float(100 * 4 / (h - h.mean(dim=0)).square().sum())
    assert measure(h, recon, splits=[50]).fvu == pytest.approx(expected, rel=1e-9)


@given(splits=st.lists(st.integers(0, 40), max_size=5))
def test_batches_do_not_matter(splits: list[int]) -> None:
    h, recon = normal(40, 4) * 3 + 5, normal(40, 4, seed=1)
    code = SparseCode(
        torch.randint(0, 5, (40, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(0)), normal(40, 2)
    )
    whole, parts = measure(h, recon, code), measure(h, recon, code, splits)
    for name in ("relative_error", "fvu", "l0"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert (parts.silent, parts.tokens) == (whole.silent, whole.tokens)


def test_half_precision_is_measured_in_double() -> None:
    h = torch.full((3000, 1), 100.0, dtype=torch.float16)
    h[::2] = 101
    result = measure(h, torch.full_like(h, 100.5))
    assert result.fvu == pytest.approx(1)


def test_what_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="no activations to evaluate"):
        ReconstructionMeter(5).result()
    for value in (0.0, 0.1, 1e6):
        h = torch.full((7, 3), value)
        with pytest.raises(ValueError, match="all 7 activations are equal"):
            measure(h, h + 1, code_of(torch.ones(7, 2)), [2])


def test_reconstruction_of_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = SAE.expander(Mask.build("balanced", d_in=8, d_sae=20, degree=3), 4)
    h = normal(300, 8).float() + 3
    result = reconstruction(sae, TensorSource(h))
    recon = sae(h).detach()
    assert result.fvu == pytest.approx(float((h - recon).square().sum() / (h - h.mean(0)).square().sum()), rel=1e-5)
    assert result.relative_error == pytest.approx(float(((h - recon).norm(dim=1) / h.norm(dim=1)).mean()), rel=1e-5)
    assert (result.l0, result.tokens) == (4, 300)
    monkeypatch.setattr("expander_sae.evaluation.metrics._ROWS_AT_ONCE", 37)
    assert reconstruction(sae, TensorSource(h)).fvu == pytest.approx(result.fvu, rel=1e-9)
    with pytest.raises(ValueError, match="the activations have width 5, the SAE reads d_in = 8"):
        reconstruction(sae, TensorSource(normal(10, 5)))


def test_ce_recovered() -> None:
    assert ce_recovered(3.0, 13.0, 3.0) == 1
    assert ce_recovered(3.0, 13.0, 13.0) == 0
    assert ce_recovered(3.0, 13.0, 4.0) == pytest.approx(0.9)
    assert ce_recovered(3.0, 13.0, 23.0) == -1
    assert ce_recovered(3.0, 13.0, 2.0) > 1
    for zero in (3.0, 2.9, math.nan):
        assert ce_recovered(3.0, zero, 3.0) is None  # other metrics must not be lost over it


# In a language model


def windows(count: int, seed: int = 0) -> list[Tensor]:
    """Token ``t`` is followed by ``t + 1``: something that a small model learns at once."""
    starts = torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))
    return [(start + torch.arange(WINDOW)) % VOCAB for start in starts]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        tokens = torch.stack(windows(16, seed=step))
        optimiser.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()
    return LanguageModel(model, tokenizer=None, name="tiny")


def identity() -> SAE:
    """``h = relu(h) - relu(-h)`` on 2 m features."""
    sae = SAE.dense(WIDTH, 2 * WIDTH, k=WIDTH, relu=True, unit_norm=False)
    with torch.no_grad():
        sae.dictionary.values.copy_(torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]))  # type: ignore[union-attr]
    return sae


def zeros() -> SAE:
    sae = SAE.dense(WIDTH, 8, k=2, unit_norm=False)
    with torch.no_grad():
        sae.dictionary.values.zero_()  # type: ignore[union-attr]
    return sae


def expander() -> SAE:
    return SAE.expander(Mask.build("balanced", d_in=WIDTH, d_sae=64, degree=5), 8)


def mean_ce(lm: LanguageModel, chosen: list[Tensor], layer: int, replace) -> float:
    tokens = torch.stack(chosen)
    logits = splice(lm, tokens, layer, replace)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize("replaced", ["all-but-first", "all"])
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_identity_zero_and_everything_between(lm: LanguageModel, replaced: str, layer: int) -> None:
    chosen = windows(10)
    saes = {"identity": identity(), "zeros": zeros(), "expander": expander()}
    results = evaluate_in_model(saes, lm, chosen, layer, replaced=replaced)  # type: ignore[arg-type]
    first = 1 if replaced == "all-but-first" else 0
    tokens = torch.stack(chosen)
    h = residual(lm, tokens, layer)[:, first:].flatten(0, 1).double()
    energy, variance = h.square().sum(), (h - h.mean(dim=0)).square().sum()

    same, nothing, some = (results[name] for name in saes)
    assert same.ce_recovered == pytest.approx(1, abs=1e-4)
    assert same.reconstruction.fvu == pytest.approx(0, abs=1e-10)
    assert nothing.ce_recovered == 0
    assert nothing.ce_recon == nothing.ce_zero
    assert nothing.reconstruction.fvu == pytest.approx(float(energy / variance), rel=1e-5)
    assert nothing.reconstruction.relative_error == pytest.approx(1)
    assert (nothing.reconstruction.l0, nothing.reconstruction.silent) == (0, 8)

    def keeping_first(new: Tensor, hidden: Tensor) -> Tensor:
        return torch.cat([hidden[:, :first], new[:, first:]], dim=1)

    model = lm.model(input_ids=tokens, labels=tokens).loss
    assert some.ce_clean == same.ce_clean == pytest.approx(float(model), rel=1e-4)
    assert some.ce_zero == pytest.approx(mean_ce(lm, chosen, layer, lambda x: keeping_first(x * 0, x)), rel=1e-4)
    assert some.ce_recon == pytest.approx(
        mean_ce(lm, chosen, layer, lambda x: keeping_first(saes["expander"](x), x)), rel=1e-4
    )
    assert some.ce_recovered == pytest.approx((some.ce_zero - some.ce_recon) / (some.ce_zero - some.ce_clean))
    assert some.predictions == 10 * (WINDOW - 1)
    assert some.reconstruction.tokens == 10 * (WINDOW - first)
    assert some.replaced == replaced
    recon = saes["expander"](h.float()).detach().double()
    assert some.reconstruction.fvu == pytest.approx(float((h - recon).square().sum() / variance), rel=1e-4)
    assert some.to_dict()["fvu"] == some.reconstruction.fvu


def test_an_sae_reads_and_is_replaced_in_its_basis(lm: LanguageModel) -> None:
    chosen, basis = windows(5), OrthogonalBasis.random(WIDTH, 3)
    plain = SAE.dense(WIDTH, 48, k=6, seed=1)
    turned = SAE.dense(WIDTH, 48, k=6, seed=1)
    with torch.no_grad():
        plain.b_dec.copy_(normal(WIDTH).float() / 10)
        turned.b_dec.copy_(basis.coordinates(plain.b_dec))
        turned.dictionary.values.copy_(basis.coordinates(plain.dictionary.values))  # type: ignore[union-attr, operator]
    expected = evaluation_rows({"a": plain}, lm, chosen, 1)[0]
    assert evaluation_rows({"a": turned}, lm, chosen, 1)[0]["fvu"] != pytest.approx(expected["fvu"], rel=0.01)
    turned.enter_basis_(basis)
    found = evaluation_rows({"a": turned}, lm, chosen, 1)[0]
    for name in ("fvu", "relative_error", "ce_recovered", "ce_recon", "omp_fvu", "omp_ce_recovered", "l0", "silent"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def test_neither_batches_nor_company_change_a_result(lm: LanguageModel) -> None:
    chosen = windows(7)
    alone = evaluate_in_model({"a": expander()}, lm, chosen, 1, batch_windows=7)["a"].to_dict()
    for batch_windows in (1, 3, 50):
        both = evaluate_in_model({"b": zeros(), "a": expander()}, lm, chosen, 1, batch_windows=batch_windows)[
            "a"
        ].to_dict()
        for name, value in alone.items():
            if name != "seconds":
                assert both[name] == value or both[name] == pytest.approx(value, rel=1e-4)


def test_positions_with_outlying_norms_are_left_alone_and_counted(lm: LanguageModel) -> None:
    chosen = windows(4)
    norms = residual(lm, torch.stack(chosen), 1)[:, 1:].norm(dim=2)
    multiple = float(norms.max() / norms.median()) * 0.999  # the largest is out, and perhaps others as large
    out = int((norms > multiple * norms.median()).sum())
    guarded = evaluate_in_model({"a": zeros()}, lm, chosen, 1, max_norm_multiple=multiple)["a"]
    free = evaluate_in_model({"a": zeros()}, lm, chosen, 1, max_norm_multiple=None)["a"]
    assert (guarded.left_alone, free.left_alone) == (out, 0)
    assert out >= 1
    assert guarded.reconstruction.tokens == free.reconstruction.tokens - out
    assert guarded.ce_recon == guarded.ce_zero != free.ce_zero


def test_an_sae_in_half_precision(lm: LanguageModel) -> None:
    full, half = (evaluate_in_model({"a": sae}, lm, windows(7), 1)["a"] for sae in (expander(), expander().half()))
    assert half.reconstruction.fvu == pytest.approx(full.reconstruction.fvu, rel=1e-2)


def test_rows_for_the_table(lm: LanguageModel) -> None:
    sae = expander()
    sae.metadata["training"] = {"dead": 3, "seconds": 1.5}
    rows = evaluation_rows({"x": sae, "y": zeros()}, lm, windows(5), 1)
    assert [row["name"] for row in rows] == ["x", "y"]
    row = rows[0]
    assert (row["dictionary"], row["degree"], row["encoder"], row["d_sae"], row["k"]) == ("expander", 5, "tied", 64, 8)
    assert (row["dead"], row["train_seconds"]) == (3, 1.5)
    assert (row["num_values"], row["num_bytes"]) == (sae.num_values, sae.num_bytes)
    assert row["omp_fvu"] < row["fvu"]
    assert rows[1]["dead"] is None
    assert rows[1]["degree"] is None


@pytest.mark.parametrize(
    ("saes", "chosen", "layer", "options", "message"),
    [
        ({"a": SAE.dense(8, 9, k=2)}, windows(2), 0, {}, "a reads d_in = 8, the model's residual stream has width 32"),
        ({"a": zeros()}, [], 0, {}, "at least one window"),
        ({"a": zeros()}, [torch.tensor([1])], 0, {}, "at least two tokens"),
        ({"a": zeros()}, [torch.tensor([1, 2, 3]), torch.tensor([1, 2])], 0, {}, "one length"),
        ({"a": zeros()}, windows(2), LAYERS, {}, f"tiny has no layer {LAYERS}"),
        ({"a": zeros()}, windows(2), 0, {"replaced": "some"}, "replaced must be 'all-but-first' or 'all', got 'some'"),
    ],
)
def test_bad_input(lm: LanguageModel, saes, chosen, layer, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_in_model(saes, lm, chosen, layer, **options)
