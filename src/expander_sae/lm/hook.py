"""Read the residual stream at a layer, and put another one in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from expander_sae.lm.models import LanguageModel

Replace = Callable[[torch.Tensor], torch.Tensor]


class _Reached(Exception):
    """Ends a forward pass once the hooked block has run."""


def residual(lm: LanguageModel, tokens: torch.Tensor, layer: int) -> torch.Tensor:
    """The residual stream after block ``layer`` (0-based), ``(B, T, d_model)`` in the model's dtype.

    It equals ``hidden_states[layer + 1]`` of ``transformers``, except at the last block, where that one is
    taken after the final norm and this one before it. The forward pass stops after the block.
    ``tokens``: int ``(B, T)``, whole windows without padding.

    Raises ``ValueError`` for a layer that does not exist or tokens of another shape or type.
    """
    lm.check_layer(layer)
    found: list[torch.Tensor] = []

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(_hidden(output))
        raise _Reached

    with _hooked(lm.blocks[layer], stop):
        try:
            _forward(lm, tokens)
        except _Reached:
            return found[0]
    raise RuntimeError(f"{lm.name} never ran its block {layer}: the forward pass skips it")


def splice(lm: LanguageModel, tokens: torch.Tensor, layer: int, replace: Replace) -> torch.Tensor:
    """Logits ``(B, T, vocab)`` with block ``layer``'s output ``h`` replaced by ``replace(h)``.

    ``replace`` takes and gives ``(B, T, d_model)``; its result is cast to the model's dtype. Gradients flow
    through the later blocks into ``replace`` where gradients are enabled.

    Raises ``ValueError`` for a layer that does not exist, bad tokens, or a replacement of another shape.
    """
    lm.check_layer(layer)

    def exchange(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = _hidden(output)
        return _like(output, _fitting(replace(hidden), hidden.shape).to(hidden))

    with _hooked(lm.blocks[layer], exchange):
        return _forward(lm, tokens)


def continue_from(lm: LanguageModel, tokens: torch.Tensor, layer: int, residual: torch.Tensor) -> torch.Tensor:
    """Logits ``(B, T, vocab)`` of the model whose residual stream after block ``layer`` is ``residual``.

    Equals ``splice(lm, tokens, layer, lambda h: residual)``, but blocks 0 to ``layer`` do not run: many
    dictionaries can be judged for the price of one prefix. ``residual``: ``(B, T, d_model)``.

    Raises ``ValueError`` as ``splice`` does.
    """
    lm.check_layer(layer)
    residual = _fitting(residual, (*tokens.shape, lm.d_model)).to(lm.device, lm.dtype)
    as_output = _output_form(lm)
    # The model's own forward runs, so that masks, position embeddings and the head are the model's business.
    with _bypassed(list(lm.blocks[: layer + 1]), lambda *_args, **_kwargs: as_output(residual)):
        return _forward(lm, tokens)


def _forward(lm: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens must be integers of shape (B, T), not {tokens.dtype} {tuple(tokens.shape)}")
    return lm.model(input_ids=tokens.to(lm.device).long(), use_cache=False).logits


def _hidden(output: Any) -> torch.Tensor:
    """The hidden states in a block's output: some architectures give a tensor, others a tuple led by it."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(f"a decoder block gave {type(output).__name__}, neither a tensor nor a tuple with one")
    return hidden


def _like(output: Any, hidden: torch.Tensor) -> Any:
    """``hidden`` in the form of ``output``."""
    return type(output)((hidden, *output[1:])) if isinstance(output, (tuple, list)) else hidden


def _output_form(lm: LanguageModel) -> Callable[[torch.Tensor], Any]:
    """How this model's blocks wrap their hidden states, learned by running its first block on one token."""
    seen: list[Any] = []

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output)
        raise _Reached

    with _hooked(lm.blocks[0], stop), suppress(_Reached):
        _forward(lm, torch.zeros((1, 1), dtype=torch.long))
    output = seen[0]
    _hidden(output)
    return lambda hidden: _like(output, hidden)


def _fitting(replacement: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    if tuple(replacement.shape) != tuple(shape):
        raise ValueError(f"the replaced residual must have shape {tuple(shape)}, not {tuple(replacement.shape)}")
    return replacement


@contextmanager
def _hooked(block: nn.Module, hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _bypassed(blocks: list[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``forward`` stand in for the blocks' own, kept as instance attributes where something (accelerate)
    had already put one there."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = forward
        yield
    finally:
        for block, old in zip(blocks, before, strict=True):
            if old is not None:
                block.forward = old
            elif "forward" in block.__dict__:
                del block.forward
