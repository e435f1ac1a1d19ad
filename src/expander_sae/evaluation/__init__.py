"""Evaluation: every metric, defined once."""

from __future__ import annotations

from expander_sae.evaluation.in_model import InModel, evaluate_in_model, evaluation_rows
from expander_sae.evaluation.metrics import Reconstruction, ReconstructionMeter, ce_recovered, reconstruction

__all__ = [
    "InModel",
    "Reconstruction",
    "ReconstructionMeter",
    "ce_recovered",
    "evaluate_in_model",
    "evaluation_rows",
    "reconstruction",
]
