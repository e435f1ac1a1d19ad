"""What is replaced under each convention, which norms are left alone, and in which model an SAE may be evaluated."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.lm import BOS, LAYERS, VOCAB, router_state_lm, shared_keys_lm, tiny_lm, tiny_tokenizer
from torch import Tensor

from expander_sae.evaluation import (
    CONVENTIONS,
    MismatchError,
    convention_named,
    differences,
    evaluate_in_model,
    evaluation_rows,
)
from expander_sae.lm import LanguageModel, Site, capture, splice
from expander_sae.mask import Mask
from expander_sae.sae import SAE

LOUD = 7  # a token whose embedding is enormous: an attention sink
WINDOW = 10


def windows(count: int = 8, loud: tuple[tuple[int, int], ...] = ()) -> list[Tensor]:
    """Random windows without the loud token but at the places ``(window, position)`` given."""
    tokens = torch.randint(8, VOCAB - 2, (count, WINDOW), generator=torch.Generator().manual_seed(0))
    for window, position in loud:
        tokens[window, position] = LOUD
    return list(tokens)


def loud_lm() -> LanguageModel:
    lm = tiny_lm()
    lm.model.get_input_embeddings().weight[LOUD] *= 1e4
    return lm


def an_sae(**origin) -> SAE:
    sae = SAE.expander(Mask.build("balanced", d_in=32, d_sae=64, degree=5), 8)
    if origin:
        sae.metadata["trained_on"] = origin
    return sae


def ce(lm: LanguageModel, chosen: list[Tensor], site: Site, new) -> float:
    tokens = torch.stack(chosen)
    logits = splice(lm, tokens, site.layer, new, site.hook)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def keeping(positions: Tensor, new):
    """A replacement that leaves ``positions`` (bool ``(B, T)``) alone."""
    return lambda h: torch.where(positions[..., None], h, new(h))


NONE = torch.zeros(8, WINDOW, dtype=torch.bool)
FIRST = NONE.clone()
FIRST[:, 0] = True


@pytest.mark.parametrize(
    ("options", "alone"),
    [
        ({}, "first-and-loud"),
        ({"convention": "ours"}, "first-and-loud"),
        ({"replaced": "all"}, "loud-but-not-first"),
        ({"convention": "paper"}, "none"),
        ({"convention": "saelens"}, "none"),
        ({"convention": "paper", "replaced": "all-but-first"}, "first"),
        ({"max_norm_multiple": None}, "first"),
        ({"max_norm_multiple": None, "replaced": "all"}, "none"),
    ],
    ids=str,
)
def test_which_positions_are_replaced(options, alone: str) -> None:
    lm = loud_lm()
    chosen = windows(loud=((0, 0), (1, 0), (2, 5)))
    loud = NONE.clone()
    loud[2, 5] = True
    kept = {"none": NONE, "first": FIRST, "loud-but-not-first": loud, "first-and-loud": loud | FIRST}[alone]
    sae = an_sae()
    found = evaluate_in_model({"a": sae}, lm, chosen, 1, **options)["a"]
    site = Site(1)
    assert found.ce_clean == pytest.approx(ce(lm, chosen, site, lambda h: h), rel=1e-5)
    assert found.ce_zero == pytest.approx(ce(lm, chosen, site, keeping(kept, torch.zeros_like)), rel=1e-5)
    assert found.ce_recon == pytest.approx(ce(lm, chosen, site, keeping(kept, sae)), rel=1e-5)
    assert found.reconstruction.tokens == 8 * WINDOW - int(kept.sum())
    assert found.left_alone == int(kept[:, 1:].sum())
    assert found.replaced == ("all-but-first" if bool(kept[:, 0].all()) else "all")


def test_replacing_all_positions_is_not_replacing_all_but_the_first() -> None:
    """Though the first has so large a norm that a guard would leave it alone."""
    lm = loud_lm()
    chosen = windows(loud=tuple((i, 0) for i in range(8)))
    ours, everything = (evaluate_in_model({"a": an_sae()}, lm, chosen, 1, replaced=r)["a"] for r in (None, "all"))
    assert everything.ce_zero == pytest.approx(math.log(VOCAB))  # nothing of the text is left
    assert ours.ce_zero > everything.ce_zero + 1e-3
    assert (ours.left_alone, everything.left_alone) == (0, 0)


def test_the_convention_is_named() -> None:
    rows = evaluation_rows({"a": an_sae()}, tiny_lm(), windows(), 1, convention="paper")
    assert (rows[0]["convention"], rows[0]["replaced"], rows[0]["norm_limit"]) == ("paper", "all", None)
    assert convention_named("paper").with_replaced("all").name == "paper"
    assert convention_named("ours").with_replaced("all").name == "ours, replaced all"
    with pytest.raises(ValueError, match="convention must be one of ours, paper, saelens, got 'mine'"):
        convention_named("mine")
    paper, saelens = CONVENTIONS["paper"], CONVENTIONS["saelens"]
    assert (paper.window, paper.windows, paper.concatenate) == (128, 100, False)
    assert (saelens.window, saelens.windows, saelens.bos, saelens.separator) == (128, 160, True, "bos")


# The norm guard


def test_the_limit_does_not_depend_on_batches() -> None:
    """The first window is quiet, the others loud: its median alone would call them all too large."""
    lm = tiny_lm()
    lm.model.get_input_embeddings().weight[8:30] *= 100
    quiet = torch.randint(30, VOCAB - 2, (1, WINDOW), generator=torch.Generator().manual_seed(0))
    noisy = torch.randint(8, 30, (7, WINDOW), generator=torch.Generator().manual_seed(0))
    chosen = list(torch.cat([quiet, noisy]))
    found = [evaluate_in_model({"a": an_sae()}, lm, chosen, 0, batch_windows=n)["a"] for n in (1, 3, 8)]
    assert {result.left_alone for result in found} == {0}
    assert {result.norm_limit_source for result in found} == {"calibrated on the evaluation text"}
    assert len({result.norm_limit for result in found}) == 1
    norms = capture(lm, torch.stack(chosen), [Site(0)])[Site(0)][:, 1:].norm(dim=2)
    assert found[0].norm_limit == pytest.approx(10 * float(norms.median()), rel=1e-5)
    assert found[0].ce_zero == pytest.approx(found[2].ce_zero, rel=1e-5)


def test_the_recorded_limit_is_used() -> None:
    lm = loud_lm()
    chosen = windows(loud=((2, 5),))
    norms = capture(lm, torch.stack(chosen), [Site(1)])[Site(1)][:, 1:].norm(dim=2)
    limit = float(norms.quantile(0.5))
    sae = an_sae(norm_median=limit / 4, norm_limit=limit, max_norm_multiple=4.0)
    found = evaluate_in_model({"a": sae}, lm, chosen, 1)["a"]
    assert (found.norm_limit, found.norm_limit_source) == (pytest.approx(limit), "recorded")
    assert found.left_alone == int((norms > found.norm_limit).sum()) > 30
    other = evaluate_in_model({"a": sae}, lm, chosen, 1, max_norm_multiple=8.0)["a"]
    assert other.norm_limit == pytest.approx(2 * limit)
    assert evaluate_in_model({"a": sae}, lm, chosen, 1, max_norm_multiple=None)["a"].norm_limit is None
    unguarded = an_sae(norm_median=limit / 4, norm_limit=None, max_norm_multiple=None)
    assert evaluate_in_model({"a": unguarded}, lm, chosen, 1)["a"].left_alone == 0
    both = evaluate_in_model({"a": sae, "b": an_sae(norm_median=limit, max_norm_multiple=4.0)}, lm, chosen, 1)["a"]
    assert both.norm_limit_source == "calibrated on the evaluation text"
    with pytest.raises(ValueError, match=r"max_norm_multiple must be above 1 .*, not 0\.5"):
        evaluate_in_model({"a": sae}, lm, chosen, 1, max_norm_multiple=0.5)


def test_special_tokens_are_left_alone_if_the_training_set_has_none() -> None:
    lm, chosen = tiny_lm(), windows()
    chosen[3][4] = 1  # EOS
    assert evaluate_in_model({"a": an_sae()}, lm, chosen, 1)["a"].left_alone == 0
    found = evaluate_in_model({"a": an_sae(skip_special=True)}, lm, chosen, 1)["a"]
    kept = FIRST.clone()
    kept[3, 4] = True
    assert found.left_alone == 1
    assert found.ce_zero == pytest.approx(ce(lm, chosen, Site(1), keeping(kept, torch.zeros_like)), rel=1e-5)
    assert evaluate_in_model({"a": an_sae(skip_special=True)}, lm, chosen, 1, convention="paper")["a"].left_alone == 0


def test_saelens_zeroes_special_tokens_but_neither_reconstructs_nor_predicts_from_them() -> None:
    """As the replacement and the ablation hook of SAELens 6.54 do, and its mean over positions."""
    lm, chosen, sae = replace(tiny_lm(), tokenizer=tiny_tokenizer(bos=True)), windows(), an_sae()
    special = NONE.clone()
    special[:, 0] = special[3, 4] = special[5, -1] = True
    tokens = torch.where(special, BOS, torch.stack(chosen))
    tokens[3, 4] = 1  # EOS
    counted = ~special[:, :-1]

    def mean(new) -> float:
        losses = torch.nn.functional.cross_entropy(
            splice(lm, tokens, 1, new)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        return losses[counted].mean().item()

    found = evaluate_in_model({"a": sae}, lm, list(tokens), 1, convention="saelens")["a"]
    assert found.predictions == int(counted.sum())
    assert found.left_alone == int(special.sum())
    assert found.reconstruction.tokens == int((~special).sum())
    assert found.ce_clean == pytest.approx(mean(lambda h: h), rel=1e-5)
    assert found.ce_zero == pytest.approx(mean(torch.zeros_like), rel=1e-5)
    assert found.ce_recon == pytest.approx(mean(keeping(special, sae)), rel=1e-5)


# The place in the model, and the model


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("hook", ["attention", "mlp"])
def test_parts_are_replaced_where_they_were_read(layer: int, hook) -> None:
    lm, chosen, sae = tiny_lm(), windows(), an_sae(layer=layer, hook=hook)
    found = evaluate_in_model({"a": sae}, lm, chosen, layer)["a"]
    site = Site(layer, hook)
    assert found.ce_zero == pytest.approx(ce(lm, chosen, site, keeping(FIRST, torch.zeros_like)), rel=1e-5)
    assert found.ce_recon == pytest.approx(ce(lm, chosen, site, keeping(FIRST, sae)), rel=1e-5)
    h = capture(lm, torch.stack(chosen), [site])[site][:, 1:].flatten(0, 1)
    variance = (h - h.mean(dim=0)).square().sum()
    assert found.reconstruction.fvu == pytest.approx(float((h - sae(h).detach()).square().sum() / variance), rel=1e-4)
    with pytest.raises(MismatchError, match=f"hook: trained on '{hook}', this is 'residual'"):
        evaluate_in_model({"a": sae}, lm, chosen, layer, hook="residual")
    sae.metadata["trained_on"] |= {"norm_median": 1e-6, "max_norm_multiple": 10.0}  # of this place, not of others
    elsewhere = evaluate_in_model({"a": sae}, lm, chosen, layer, hook="residual", allow_mismatch=True)["a"]
    assert (elsewhere.left_alone, elsewhere.norm_limit_source) == (0, "calibrated on the evaluation text")
    assert elsewhere.ce_zero != pytest.approx(found.ce_zero, rel=1e-4)


@pytest.mark.parametrize("make", [router_state_lm, lambda: router_state_lm(strict=True), shared_keys_lm])
def test_models_that_hand_on_more_get_right_numbers(make) -> None:
    lm, chosen, sae = make(), windows(), an_sae()
    with pytest.warns(UserWarning, match="hand on more than their hidden state") as warned:
        found = evaluate_in_model({"a": sae}, lm, chosen, 1, batch_windows=3)["a"]
    assert len(warned) == 1
    assert found.ce_clean == pytest.approx(ce(lm, chosen, Site(1), lambda h: h), rel=1e-5)
    assert found.ce_recon == pytest.approx(ce(lm, chosen, Site(1), keeping(FIRST, sae)), rel=1e-5)


def test_another_model_is_refused() -> None:
    lm = replace(tiny_lm(), revision="a" * 40)
    right = an_sae(model=lm.name, revision="a" * 40, layer=1, tokenizer_hash=lm.tokenizer_hash)
    assert differences({"x": right}, lm, 1) == []
    evaluate_in_model({"x": right}, lm, windows(), 1)
    for other, what in [
        (replace(lm, revision="b" * 40), f"weights: trained on {'a' * 40} of tiny-llama, this is {'b' * 40}"),
        (replace(tiny_lm(tokenizer=tiny_tokenizer(bos=True)), revision="a" * 40), "tokenizer: trained with tokenizer-"),
    ]:
        with pytest.raises(MismatchError, match=what):
            evaluation_rows({"x": right}, other, windows(), 1)
        assert evaluation_rows({"x": right}, other, windows(), 1, allow_mismatch=True)[0]["fvu"] > 0
    with pytest.raises(MismatchError, match=r"layer: trained on 1, this is 2(?s:.*)--allow-mismatch"):
        evaluate_in_model({"x": right}, lm, windows(), 2)
    with pytest.raises(ValueError, match=r"several hooks \(mlp, residual\): evaluate them apart"):
        evaluate_in_model({"x": an_sae(hook="mlp"), "y": an_sae(hook="residual")}, lm, windows(), 1)


def test_windows_beyond_the_context_are_refused_before_the_work() -> None:
    for architecture in ("gpt2", "llama"):
        with pytest.raises(ValueError, match="from 2 to the model's context of 64 tokens, not 65"):
            evaluate_in_model({"a": an_sae()}, tiny_lm(architecture), [torch.ones(65, dtype=torch.int64)], 1)


def test_rows_say_whether_codes_may_be_negative() -> None:
    mask = Mask.build("balanced", d_in=32, d_sae=64, degree=5)
    saes = {"signed": SAE.expander(mask, 8), "clipped": SAE.expander(mask, 8, relu=True)}
    saes["pursuit"] = saes["signed"].with_encoder("omp")
    rows = evaluation_rows(saes, tiny_lm(), windows(), LAYERS - 1)
    assert {row["name"]: row["signed"] for row in rows} == {"signed": True, "clipped": False, "pursuit": True}
