"""Training: the one loop, its recipes, its log and its checkpoints."""

from __future__ import annotations

from expander_sae.training.config import TrainConfig
from expander_sae.training.divergence import TrainingDiverged
from expander_sae.training.interrupt import Stopped
from expander_sae.training.run import train
from expander_sae.training.saved import load_sae, sae_from_checkpoint
from expander_sae.training.start import build_sae
from expander_sae.training.trainer import Trainer

__all__ = [
    "Stopped",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "build_sae",
    "load_sae",
    "sae_from_checkpoint",
    "train",
]
