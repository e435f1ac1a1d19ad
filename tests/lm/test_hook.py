"""The hooks against ``transformers`` itself, on eight architectures."""

from __future__ import annotations

import pytest
import torch
from support.lm import LAYERS, tiny_lm
from torch import nn

from expander_sae.lm import LanguageModel, continue_from, residual, splice


def hidden_states(lm: LanguageModel, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return lm.model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states


def logits(lm: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    return lm.model(input_ids=tokens, use_cache=False).logits


class CountCalls:
    """Counts how often each of the model's blocks, and its head, really runs."""

    def __init__(self, lm: LanguageModel) -> None:
        self.blocks = [0] * lm.num_layers
        self.head = 0
        # Inside the block, so that a block whose own forward is bypassed is seen not to run.
        insides = [next(m for m in block.modules() if isinstance(m, nn.Linear | nn.LayerNorm)) for block in lm.blocks]
        self.handles = [m.register_forward_pre_hook(self._block(i)) for i, m in enumerate(insides)]
        self.handles.append(lm.model.get_output_embeddings().register_forward_pre_hook(self._head))

    def _block(self, number: int):
        def count(_module: nn.Module, _args: object) -> None:
            self.blocks[number] += 1

        return count

    def _head(self, _module: nn.Module, _args: object) -> None:
        self.head += 1

    def __enter__(self) -> CountCalls:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("layer", range(LAYERS - 1))
def test_residual_is_transformers_hidden_state(any_lm, tokens, layer):
    expected = hidden_states(any_lm, tokens)[layer + 1]
    torch.testing.assert_close(residual(any_lm, tokens, layer), expected, rtol=0, atol=1e-6)


def test_residual_of_the_last_block_is_before_the_final_norm(any_lm, tokens):
    last = residual(any_lm, tokens, LAYERS - 1)
    again = continue_from(any_lm, tokens, LAYERS - 1, last)
    torch.testing.assert_close(again, logits(any_lm, tokens), rtol=0, atol=1e-5)


def test_forward_stops_after_the_layer(any_lm, tokens):
    with CountCalls(any_lm) as calls:
        residual(any_lm, tokens, 1)
    assert calls.blocks == [1, 1, 0, 0]
    assert calls.head == 0


def test_continue_from_runs_only_the_later_blocks(any_lm, tokens):
    h = residual(any_lm, tokens, 1)
    with CountCalls(any_lm) as calls:
        continue_from(any_lm, tokens, 1, h)
    # Block 0 may run once on a single token, to learn the form of a block's output.
    assert calls.blocks[1:] == [0, 1, 1]
    assert calls.head == 1


@pytest.mark.parametrize("layer", range(LAYERS))
def test_splicing_the_identity_leaves_the_logits(any_lm, tokens, layer):
    torch.testing.assert_close(splice(any_lm, tokens, layer, lambda h: h), logits(any_lm, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_splicing_zeros_is_the_zero_ablation(any_lm, tokens, layer):
    """Independent of the hooks: with every later block's input zeroed by a pre-hook the logits are the same."""
    zeroed = splice(any_lm, tokens, layer, torch.zeros_like)
    assert not torch.allclose(zeroed, logits(any_lm, tokens), atol=1e-3)

    def zero_first(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (torch.zeros_like(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": torch.zeros_like(kwargs["hidden_states"])}

    if layer + 1 < LAYERS:
        handle = any_lm.blocks[layer + 1].register_forward_pre_hook(zero_first, with_kwargs=True)
        expected = logits(any_lm, tokens)
        handle.remove()
        torch.testing.assert_close(zeroed, expected, rtol=0, atol=1e-6)
    else:  # nothing of the text is left: every position has the same logits
        torch.testing.assert_close(zeroed, zeroed[:1, :1].expand_as(zeroed), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_continue_from_equals_splice(any_lm, tokens, layer):
    h = residual(any_lm, tokens, layer)
    changed = h + torch.randn(h.shape, generator=torch.Generator().manual_seed(2))
    spliced = splice(any_lm, tokens, layer, lambda _: changed)
    torch.testing.assert_close(continue_from(any_lm, tokens, layer, changed), spliced, rtol=0, atol=1e-5)


def test_nothing_stays_behind(any_lm, tokens):
    before = logits(any_lm, tokens)
    hooks = [len(block._forward_hooks) for block in any_lm.blocks]  # transformers leaves some of its own
    h = residual(any_lm, tokens, 2)
    splice(any_lm, tokens, 1, torch.zeros_like)
    continue_from(any_lm, tokens, 2, torch.zeros_like(h))
    assert [len(block._forward_hooks) for block in any_lm.blocks] == hooks
    assert all("forward" not in block.__dict__ for block in any_lm.blocks)
    assert torch.equal(logits(any_lm, tokens), before)


def test_an_error_in_the_replacement_leaves_the_model_whole(lm, tokens):
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("planted")

    before = logits(lm, tokens)
    with pytest.raises(RuntimeError, match="planted"):
        splice(lm, tokens, 1, fail)
    assert torch.equal(logits(lm, tokens), before)


def test_a_wrapped_forward_survives_continue_from(tokens):
    """accelerate puts its own ``forward`` on the instance: it must be there again afterwards."""
    lm = tiny_lm()
    original = lm.blocks[0].forward
    lm.blocks[0].forward = wrapper = lambda *args, **kwargs: original(*args, **kwargs)
    continue_from(lm, tokens, 1, residual(lm, tokens, 1))
    assert lm.blocks[0].forward is wrapper


def test_gradients_reach_the_replacement_but_no_parameter(lm, tokens):
    scale = torch.ones(lm.d_model, requires_grad=True)
    splice(lm, tokens, 1, lambda h: h * scale).logsumexp(-1).sum().backward()
    assert scale.grad is not None
    assert scale.grad.abs().sum() > 0
    assert not residual(lm, tokens, 1).requires_grad
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_replacement_is_cast_to_the_models_dtype(tokens):
    lm = tiny_lm()
    lm.model.to(torch.bfloat16)
    h = residual(lm, tokens, 1)
    assert h.dtype == torch.bfloat16
    spliced = splice(lm, tokens, 1, lambda h: h.double())
    assert torch.equal(spliced, continue_from(lm, tokens, 1, h.float()))


@pytest.mark.parametrize("layer", [-1, LAYERS, 99, 1.0, True])
@pytest.mark.parametrize("function", ["residual", "splice", "continue_from"])
def test_a_layer_that_does_not_exist(lm, tokens, function, layer):
    call = {
        "residual": lambda: residual(lm, tokens, layer),
        "splice": lambda: splice(lm, tokens, layer, lambda h: h),
        "continue_from": lambda: continue_from(lm, tokens, layer, torch.zeros(3, 12, 32)),
    }[function]
    with pytest.raises(ValueError, match=f"4 blocks, so layer must be an integer from 0 to {LAYERS - 1}"):
        call()


def test_bad_tokens_and_replacements(lm, tokens):
    with pytest.raises(ValueError, match=r"integers of shape \(B, T\)"):
        residual(lm, tokens[0], 1)
    with pytest.raises(ValueError, match=r"integers of shape \(B, T\)"):
        residual(lm, tokens.float(), 1)
    with pytest.raises(ValueError, match=r"must have shape \(3, 12, 32\), not \(3, 11, 32\)"):
        splice(lm, tokens, 1, lambda h: h[:, 1:])
    with pytest.raises(ValueError, match=r"must have shape \(3, 12, 32\), not \(3, 12, 31\)"):
        continue_from(lm, tokens, 1, torch.zeros(3, 12, 31))
