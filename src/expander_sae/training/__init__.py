"""Training: the one loop, its recipes, its log and its checkpoints."""

from __future__ import annotations

from expander_sae.training.trainer import TrainConfig, TrainingDiverged, train

__all__ = ["TrainConfig", "TrainingDiverged", "train"]
