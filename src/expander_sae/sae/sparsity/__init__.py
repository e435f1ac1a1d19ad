"""Who selects: sparsity rules. An encoder scores, a rule says which scores become the code.

A rule owns its penalty, what it does after a step of training, and its form at inference. A new one is a subclass of
:class:`Sparsity` here or in a plug-in, and its entry in :data:`SPARSITIES`.
"""

from __future__ import annotations

from expander_sae.registry import Registry
from expander_sae.sae.sparsity.adapted import Adapted, ReluL1
from expander_sae.sae.sparsity.base import Score, Sparsity
from expander_sae.sae.sparsity.gated import Gated
from expander_sae.sae.sparsity.jumprelu import JumpReLU
from expander_sae.sae.sparsity.topk import BatchTopK, TopK

__all__ = ["SPARSITIES", "Adapted", "BatchTopK", "Gated", "JumpReLU", "ReluL1", "Score", "Sparsity", "TopK"]

SPARSITIES: Registry[type[Sparsity]] = Registry("sparsity rule")
"""Sparsity rules by kind. Constructors take ``(d_sae, k, **options)``."""
SPARSITIES.add("topk", TopK)
SPARSITIES.add("batch-topk", BatchTopK)
SPARSITIES.add("relu-l1", ReluL1)
SPARSITIES.add("jumprelu", JumpReLU)
SPARSITIES.add("gated", Gated)
