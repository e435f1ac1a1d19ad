"""Where a language model is read and changed: the output of a block, of its attention, of its MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from expander_sae.lm.models import LanguageModel

Hook = Literal["residual", "attention", "mlp"]
HOOKS: tuple[str, ...] = get_args(Hook)

# What the parts of a block are called in transformers.
_NAMES = {
    "attention": ("self_attn", "self_attention", "attention", "attn"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe"),
}
# Blocks whose parts add the residual stream themselves, or that have no module for a part: its last linear map is it.
_INSIDE = {
    ("BloomBlock", "attention"): "self_attention.dense",
    ("BloomBlock", "mlp"): "mlp.dense_4h_to_h",
    ("OPTDecoderLayer", "mlp"): "fc2",
}


@dataclass(frozen=True, order=True)
class Site:
    """A place in a language model.

    ``layer``: the block, from 0. ``hook``: ``"residual"``, the block's output; ``"attention"``, ``"mlp"``: the output
    of that part of it, before any norm that follows the part and before it is added to the residual stream.
    """

    layer: int
    hook: Hook = "residual"

    def __str__(self) -> str:
        return f"{self.hook}-{self.layer}"


def module_at(lm: LanguageModel, site: Site) -> nn.Module:
    """The module whose output is the site.

    Raises ``ValueError`` for a layer or kind of site that does not exist, or a block that has no such part.
    """
    lm.check_layer(site.layer)
    if site.hook not in HOOKS:
        raise ValueError(f"hook must be one of {', '.join(HOOKS)}, not {site.hook!r}")
    block = lm.blocks[site.layer]
    if site.hook == "residual":
        return block
    if (inside := _INSIDE.get((type(block).__name__, site.hook))) is not None:
        return block.get_submodule(inside)
    children = dict(block.named_children())
    for name in _NAMES[site.hook]:
        if name in children:
            return children[name]
    raise ValueError(
        f"block {site.layer} of {lm.name} ({type(block).__name__}) has no {site.hook} part known here: its parts are "
        f"{', '.join(children)}. Use hook 'residual', or another layer."
    )
