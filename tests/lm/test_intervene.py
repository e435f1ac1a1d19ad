"""Leaving out the first blocks: done where it is exact, found out where it is not."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.lm import router_state_lm, shared_keys_lm, tiny_lm

from expander_sae.lm import Intervention, LanguageModel, Site, continue_from, splice

SITES = [Site(1), Site(2, "attention"), Site(2, "mlp"), Site(0), Site(0, "mlp")]


def changed(h: torch.Tensor) -> torch.Tensor:
    return h + torch.randn(h.shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("site", SITES, ids=str)
def test_it_is_the_splice_and_leaves_blocks_out(any_lm: LanguageModel, tokens: torch.Tensor, site: Site) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        intervention = Intervention(any_lm, site)
        clean = intervention.read(tokens)
        found = intervention.logits(clean, changed(clean.activations))
        assert intervention.shortcut is (site != Site(0, "mlp"))  # nothing stands before the first block
        inner = next(m for m in any_lm.blocks[0].modules() if isinstance(m, torch.nn.Linear | torch.nn.LayerNorm))
        runs = []
        handle = inner.register_forward_pre_hook(lambda _module, args: runs.append(args[0].numel() // 32))
        intervention.logits(clean, changed(clean.activations))
        handle.remove()
    expected = splice(any_lm, tokens, site.layer, lambda _: changed(clean.activations), site.hook)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # Block 0 runs on a single token, to learn the form of its output, and not on the window.
    assert (tokens.numel() in runs) == (not intervention.shortcut)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: router_state_lm(strict=True), "fails with KeyError: 'router'"),
        (router_state_lm, "changes its logits"),
        (shared_keys_lm, "hand on more than their hidden state"),
    ],
    ids=["state-missed", "state-not-missed", "gemma4"],
)
def test_models_that_hand_on_more_are_found_out(make, why: str, tokens: torch.Tensor) -> None:
    lm = make()
    site = Site(1)
    intervention = Intervention(lm, site)
    clean = intervention.read(tokens)
    with pytest.warns(UserWarning, match=why):
        found = intervention.logits(clean, changed(clean.activations))
    assert intervention.shortcut is False
    expected = splice(lm, tokens, 1, lambda _: changed(clean.activations))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    untouched = intervention.logits(clean, clean.activations)  # no second warning, and the model itself
    torch.testing.assert_close(untouched, lm.model(input_ids=tokens, use_cache=False).logits, rtol=0, atol=1e-5)


def test_the_silent_case_is_really_wrong_without_the_check(tokens: torch.Tensor) -> None:
    lm = router_state_lm()
    clean = Intervention(lm, Site(1)).read(tokens)
    wrong = continue_from(lm, tokens, 1, clean.activations)
    assert not torch.allclose(wrong, lm.model(input_ids=tokens, use_cache=False).logits, atol=1e-3)


def test_sixteen_bits_are_no_reason_to_refuse(tokens: torch.Tensor) -> None:
    lm = tiny_lm()
    lm.model.to(torch.bfloat16)
    intervention = Intervention(lm, Site(1))
    clean = intervention.read(tokens)
    intervention.logits(clean, clean.activations)
    assert intervention.shortcut is True
