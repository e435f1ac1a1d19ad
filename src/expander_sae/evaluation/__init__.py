"""Evaluation: every metric, defined once."""

from __future__ import annotations

from expander_sae.evaluation.certify import certify_sae
from expander_sae.evaluation.conventions import CONVENTIONS, Convention, convention_named
from expander_sae.evaluation.in_model import (
    InModel,
    MismatchError,
    SharedPasses,
    differences,
    evaluate_in_model,
    evaluation_rows,
)
from expander_sae.evaluation.metrics import Reconstruction, ReconstructionMeter, ce_recovered, reconstruction

__all__ = [
    "CONVENTIONS",
    "Convention",
    "InModel",
    "MismatchError",
    "Reconstruction",
    "ReconstructionMeter",
    "SharedPasses",
    "ce_recovered",
    "certify_sae",
    "convention_named",
    "differences",
    "evaluate_in_model",
    "evaluation_rows",
    "reconstruction",
]
