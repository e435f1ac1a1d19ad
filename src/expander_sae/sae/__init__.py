"""The sparse autoencoder: who scores, who selects, how it is built and how it is stored."""

from __future__ import annotations

from expander_sae.sae.encoder import Encoder, PursuitEncoder, TopKEncoder, UnrolledPursuit
from expander_sae.sae.folder import SAEFolderError
from expander_sae.sae.hub import HubError
from expander_sae.sae.sae import SAE

__all__ = ["SAE", "Encoder", "HubError", "PursuitEncoder", "SAEFolderError", "TopKEncoder", "UnrolledPursuit"]
