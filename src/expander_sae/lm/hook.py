"""Read the activations at a site of a language model, and put others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from expander_sae.lm.models import LanguageModel
from expander_sae.lm.sites import Hook, Site, module_at

Replace = Callable[[torch.Tensor], torch.Tensor]


class _Reached(Exception):
    """Ends a forward pass once the hooked modules have run."""


def residual(lm: LanguageModel, tokens: torch.Tensor, layer: int) -> torch.Tensor:
    """The residual stream after block ``layer`` (0-based), ``(B, T, d_model)`` in the model's dtype.

    It equals ``hidden_states[layer + 1]`` of ``transformers``, except at the last block, where that one is
    taken after the final norm and this one before it. Otherwise as :func:`capture`.
    """
    return capture(lm, tokens, [Site(layer)])[Site(layer)]


def capture(lm: LanguageModel, tokens: torch.Tensor, sites: Sequence[Site]) -> dict[Site, torch.Tensor]:
    """The activations at each of the sites, ``(B, T, d_model)`` in the model's dtype, from one forward pass.

    The pass stops after the last of them. ``tokens``: int ``(B, T)``, whole windows without padding.

    Raises ``ValueError`` for a site that does not exist, tokens of another shape or type, and a model whose blocks
    hand on anything but one residual stream of shape ``(B, T, d_model)``.
    """
    modules = {site: module_at(lm, site) for site in sites}
    found: dict[Site, torch.Tensor] = {}

    def keep(site: Site) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[site] = _as_stream(lm, _hidden(output), tokens, site)
            if len(found) == len(modules):
                raise _Reached

        return hook

    with ExitStack() as stack:
        for site, module in modules.items():
            stack.enter_context(_hooked(module, keep(site)))
        try:
            _forward(lm, tokens)
        except _Reached:
            return found
    missing = ", ".join(str(site) for site in modules if site not in found)
    raise RuntimeError(f"{lm.name} never ran {missing}: the forward pass skips it")


def splice(
    lm: LanguageModel, tokens: torch.Tensor, layer: int, replace: Replace, hook: Hook = "residual"
) -> torch.Tensor:
    """Logits ``(B, T, vocab)`` with the activations ``h`` at a site replaced by ``replace(h)``.

    ``replace`` takes and gives ``(B, T, d_model)``; its result is cast to the model's dtype. Gradients flow
    through the later blocks into ``replace`` where gradients are enabled.

    Raises ``ValueError`` as :func:`capture`, and for a replacement of another shape.
    """
    with _replaced(lm, tokens, Site(layer, hook), replace):
        return _forward(lm, tokens)


def continue_from(
    lm: LanguageModel,
    tokens: torch.Tensor,
    layer: int,
    residual: torch.Tensor,
    *,
    inside: tuple[Hook, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits ``(B, T, vocab)`` of the model whose residual stream after block ``layer`` is ``residual``.

    Equals ``splice(lm, tokens, layer, lambda h: residual)``, but blocks 0 to ``layer`` do not run: many
    dictionaries can be judged for the price of one prefix. True of models whose blocks hand on nothing but their
    hidden state; :class:`~expander_sae.lm.intervene.Intervention` finds out. ``residual``: ``(B, T, d_model)``.
    ``inside``: also replace what the attention or MLP of block ``layer + 1`` gives, by ``(B, T, d_model)``.

    Raises ``ValueError`` as ``splice`` does.
    """
    lm.check_layer(layer)
    residual = _fitting(residual, (*tokens.shape, lm.d_model)).to(lm.device, lm.dtype)
    as_output = _output_form(lm)
    with ExitStack() as stack:
        if inside is not None:
            hook, replacement = inside
            stack.enter_context(_replaced(lm, tokens, Site(layer + 1, hook), lambda _: replacement))
        # The model's own forward runs, so that masks, position embeddings and the head are the model's business.
        stack.enter_context(
            _bypassed(list(lm.blocks[: layer + 1]), lambda *_args, **_kwargs: as_output(residual)),
        )
        return _forward(lm, tokens)


def logits(lm: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``(B, T, vocab)`` of the model as it is."""
    return _forward(lm, tokens)


def _forward(lm: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens must be integers of shape (B, T), not {tokens.dtype} {tuple(tokens.shape)}")
    return lm.model(input_ids=tokens.to(lm.device).long(), use_cache=False).logits


def _hidden(output: Any) -> torch.Tensor:
    """The hidden states in a module's output: some architectures give a tensor, others a tuple led by it."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(f"a decoder block gave {type(output).__name__}, neither a tensor nor a tuple with one")
    return hidden


def _as_stream(lm: LanguageModel, hidden: torch.Tensor, tokens: torch.Tensor, site: Site) -> torch.Tensor:
    """``hidden`` as ``(B, T, d_model)``: OPT's MLP works on ``(B T, d_model)``."""
    wanted = (*tokens.shape, lm.d_model)
    if tuple(hidden.shape) == (tokens.numel(), lm.d_model):
        return hidden.view(wanted)
    if tuple(hidden.shape) != wanted:
        raise ValueError(
            f"{lm.name} gives {tuple(hidden.shape)} at {site}, where one stream of shape (B, T, d_model) = {wanted} "
            "was expected. Models whose blocks carry several residual streams at once, such as Gemma 3n, are not "
            "supported."
        )
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
def _replaced(lm: LanguageModel, tokens: torch.Tensor, site: Site, replace: Replace) -> Iterator[None]:
    def exchange(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = _hidden(output)
        stream = _as_stream(lm, hidden, tokens, site)
        return _like(output, _fitting(replace(stream), stream.shape).to(hidden).reshape(hidden.shape))

    with _hooked(module_at(lm, site), exchange):
        yield


@contextmanager
def _hooked(module: nn.Module, hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
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
