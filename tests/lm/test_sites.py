"""Attention and MLP outputs: on eight architectures they are what the blocks add to the residual stream."""

from __future__ import annotations

import pytest
import torch
from support.lm import LAYERS, several_streams_lm, tiny_lm
from torch import nn

from expander_sae.lm import LanguageModel, Site, capture, residual, splice

PARTS = ("attention", "mlp")


@pytest.mark.parametrize("layer", [1, LAYERS - 1])
def test_the_parts_are_what_a_block_adds(any_lm: LanguageModel, tokens: torch.Tensor, layer: int) -> None:
    found = capture(any_lm, tokens, [Site(layer - 1), Site(layer, "mlp"), Site(layer, "attention"), Site(layer)])
    added = found[Site(layer)] - found[Site(layer - 1)]
    parts = [found[Site(layer, hook)] for hook in PARTS]
    if any_lm.name == "tiny-gemma2":  # has a norm after each part
        block = any_lm.blocks[layer]
        norms = (block.post_attention_layernorm, block.post_feedforward_layernorm)
        parts = [norm(part) for norm, part in zip(norms, parts, strict=True)]
    torch.testing.assert_close(added, parts[0] + parts[1], rtol=0, atol=1e-5)


def test_several_layers_in_one_pass_are_each_what_they_are_alone(any_lm: LanguageModel, tokens: torch.Tensor) -> None:
    sites = [Site(2), Site(0), Site(1, "mlp")]
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = any_lm.blocks[0].register_forward_pre_hook(count)
    found = capture(any_lm, tokens, sites)
    handle.remove()
    assert passes == 1
    assert set(found) == set(sites)
    assert torch.equal(found[Site(2)], residual(any_lm, tokens, 2))
    assert torch.equal(found[Site(0)], residual(any_lm, tokens, 0))


@pytest.mark.parametrize("hook", PARTS)
def test_a_replaced_part_is_what_the_block_adds_then(any_lm: LanguageModel, tokens: torch.Tensor, hook) -> None:
    plain = any_lm.model(input_ids=tokens, use_cache=False).logits
    same = splice(any_lm, tokens, 1, lambda h: h, hook)
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-5)
    before = capture(any_lm, tokens, [Site(1), Site(1, hook)])
    seen = {}

    def look(_module: nn.Module, _args: object, output: object) -> None:
        seen["block"] = output if isinstance(output, torch.Tensor) else output[0]  # type: ignore[index]

    handle = any_lm.blocks[1].register_forward_hook(look)
    splice(any_lm, tokens, 1, lambda h: h * 0, hook)
    handle.remove()
    parallel = any_lm.name in ("tiny-gpt_neox", "tiny-gptj")  # the MLP does not read the attention's output
    if (hook == "mlp" or parallel) and any_lm.name != "tiny-gemma2":
        torch.testing.assert_close(seen["block"], before[Site(1)] - before[Site(1, hook)], rtol=0, atol=1e-5)
    assert not torch.allclose(seen["block"], before[Site(1)], atol=1e-3)


def test_what_is_no_site(lm: LanguageModel, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="hook must be one of residual, attention, mlp, not 'head'"):
        capture(lm, tokens, [Site(1, "head")])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no layer 4"):
        capture(lm, tokens, [Site(1), Site(4)])
    other = tiny_lm()
    other.blocks[2].attend = other.blocks[2].self_attn
    del other.blocks[2].self_attn
    with pytest.raises(ValueError, match=r"block 2 .* no attention part known here: its parts are mlp, .*attend"):
        capture(other, tokens, [Site(2, "attention")])


def test_several_streams_are_refused_by_name(tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"gives \(4, 3, 12, 32\) at residual-1, .*Gemma 3n, are not supported"):
        residual(several_streams_lm(), tokens, 1)
