"""A language model with the activations at one site replaced, as cheaply as the model allows."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from expander_sae.lm.hook import capture, continue_from, logits, splice
from expander_sae.lm.models import LanguageModel
from expander_sae.lm.sites import Site

# The two passes do the same arithmetic on the same numbers; what is allowed is another order of summation. As a part
# of the logits' standard deviation.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_TOLERANCE_16_BIT = 3e-2


@dataclass(frozen=True)
class Clean:
    """What the untouched model has at a site on ``tokens`` ``(B, T)``.

    ``activations``: ``(B, T, d_model)``. ``prefix``: the residual stream that a replacement continues from, None at
    the first block's parts, where nothing stands before.
    """

    tokens: Tensor
    activations: Tensor
    prefix: Tensor | None


class Intervention:
    """The model with the activations at one site replaced.

    The blocks before the site are left out, which is exact where a block hands on nothing but its hidden state. It is
    not where later blocks also use earlier ones' keys and values (Gemma 4), router states or the like. So the first
    window is run both ways, untouched: if the logits differ or the short way fails, every replacement is spliced into
    a whole forward pass instead, with a warning that says why.

    Attributes:
        shortcut: whether blocks are left out; None before the first window.
    """

    def __init__(self, lm: LanguageModel, site: Site) -> None:
        self.lm = lm
        self.site = site
        self.shortcut: bool | None = None

    def read(self, tokens: Tensor) -> Clean:
        """The untouched activations on ``tokens`` ``(B, T)``. Raises as :func:`~expander_sae.lm.hook.capture`."""
        if self.site.hook == "residual":
            stream = capture(self.lm, tokens, [self.site])[self.site]
            return Clean(tokens, stream, stream)
        before = [Site(self.site.layer - 1)] if self.site.layer else []
        found = capture(self.lm, tokens, [*before, self.site])
        return Clean(tokens, found[self.site], found[before[0]] if before else None)

    def logits(self, clean: Clean, activations: Tensor) -> Tensor:
        """Logits ``(B, T, vocab)`` with ``activations`` ``(B, T, d_model)`` at the site."""
        if self.shortcut is None:
            self.shortcut = self._shortcut_is_exact(clean)
        if self.shortcut:
            return self._continue(clean, activations)
        return splice(self.lm, clean.tokens, self.site.layer, lambda _: activations, self.site.hook)

    def _continue(self, clean: Clean, activations: Tensor) -> Tensor:
        if self.site.hook == "residual":
            return continue_from(self.lm, clean.tokens, self.site.layer, activations)
        assert clean.prefix is not None
        inside = (self.site.hook, activations)
        return continue_from(self.lm, clean.tokens, self.site.layer - 1, clean.prefix, inside=inside)

    def _shortcut_is_exact(self, clean: Clean) -> bool:
        if clean.prefix is None:
            return False
        first = Clean(clean.tokens[:1], clean.activations[:1], clean.prefix[:1])
        whole = logits(self.lm, first.tokens).float()
        try:
            short = self._continue(first, first.activations).float()
        except Exception as error:  # whatever the model's own code makes of a missing state
            why = f"leaving out the first blocks fails with {type(error).__name__}: {error}"
        else:
            off = float((short - whole).abs().max() / whole.std())
            if off <= _TOLERANCE.get(self.lm.dtype, _TOLERANCE_16_BIT):
                return True
            why = f"leaving out the first blocks changes its logits, by up to {off:.2g} standard deviations"
        warnings.warn(
            f"The blocks of {self.lm.name} hand on more than their hidden state ({why}). Every replacement is put "
            "into a whole forward pass instead: slower, and right.",
            stacklevel=4,
        )
        return False
