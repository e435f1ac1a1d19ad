"""The sparse autoencoder: who scores, who selects, how it is built and how it is stored."""

from __future__ import annotations

from expander_sae.sae.config import SAEConfig
from expander_sae.sae.encoder import ENCODERS, Encoder, PursuitEncoder, TiedEncoder, UnrolledPursuit, UntiedEncoder
from expander_sae.sae.folder import SAEFolderError
from expander_sae.sae.hub import HubError
from expander_sae.sae.pruning import pruned
from expander_sae.sae.sae import SAE
from expander_sae.sae.sparsity import SPARSITIES, BatchTopK, Gated, JumpReLU, ReluL1, Score, Sparsity, TopK

__all__ = [
    "ENCODERS",
    "SAE",
    "SPARSITIES",
    "BatchTopK",
    "Encoder",
    "Gated",
    "HubError",
    "JumpReLU",
    "PursuitEncoder",
    "ReluL1",
    "SAEConfig",
    "SAEFolderError",
    "Score",
    "Sparsity",
    "TiedEncoder",
    "TopK",
    "UnrolledPursuit",
    "UntiedEncoder",
    "pruned",
]
