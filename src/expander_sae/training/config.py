"""What a training run does: one field for each setting, with the paper's recipe as defaults."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

NOT_IDENTITY = ("steps", "log_every", "checkpoint_every")
"""Fields that may differ when a run is continued: more steps make it longer, the others only look at it."""


@dataclass(frozen=True)
class TrainConfig:
    """What the loop does. The defaults are the paper's recipe (docs/training.md names the deviations)."""

    steps: int = 5000
    """Optimiser steps."""
    batch_size: int = 256
    """Activation vectors per step."""
    lr: float = 3e-4
    """Adam's learning rate at the first step (after warm-up); one cosine period leads down to ``lr_final``."""
    lr_final: float = 1e-5
    """Where the cosine ends, after the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    clip_norm: float = 1.0
    """Global gradient norm is clipped to this."""
    b_dec_init: Literal["zero", "mean"] = "zero"
    """Where a fresh SAE's ``b_dec`` starts; ``mean`` is the mean of a sample of the activations. One that is not zero
    any more is left alone."""
    scale_activations: bool = False
    """Train on activations scaled to ``mean ‖h - h̄‖² = d_in``; folded back into the biases at the end, exactly."""
    resample_every: int = 1000
    """Re-aim features that fired fewer than ``resample_below`` times every so many steps; 0 never does."""
    resample_below: int = 5
    """Fires between two resamplings under which a feature is re-aimed at a residual on its support."""
    resample_norm: Literal["unit", "inverse-sqrt-degree"] = "inverse-sqrt-degree"
    """Norm of a re-aimed feature's raw values: 1, or ``1/√d`` as in the author's code. Columns are normalised anyway;
    the smaller the raw values, the faster Adam's steps turn the column."""
    aux_k: int = 0
    """Dead features that help to reconstruct the residual (AuxK, Gao et al. 2024, §2.4); 0 leaves the term out."""
    aux_coefficient: float = 1 / 32
    """Weight of the AuxK term."""
    multi_topk: int = 0
    """Adds the squared error of the code of that many times ``k`` features (Multi-TopK, Gao et al. 2024, who take 4),
    so that codes wider than trained for reconstruct too; 0 leaves the term out."""
    multi_coefficient: float = 1 / 8
    """Weight of the Multi-TopK term."""
    dead_after: int = 100_000
    """Tokens without a fire after which a feature counts as dead, for AuxK and for the log."""
    seed: int = 0
    """Order of the batches and choice of resampling targets."""
    log_every: int = 50
    """Steps between two lines of the log."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "dead_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        from_zero = ("warmup_steps", "resample_every", "resample_below", "lr_final", "seed")
        for name in (*from_zero, "aux_k", "aux_coefficient", "multi_topk", "multi_coefficient"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not (self.lr > 0 and self.clip_norm > 0):
            raise ValueError(f"lr and clip_norm must be positive, got {self.lr} and {self.clip_norm}")
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        for name, choices in (("b_dec_init", ("zero", "mean")), ("resample_norm", ("unit", "inverse-sqrt-degree"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}")

    def lr_at(self, step: int) -> float:
        """Learning rate of step ``0 <= step < steps``."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return (self.lr_final + (self.lr - self.lr_final) * cosine) * min(1.0, (step + 1) / max(1, self.warmup_steps))

    def identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be continued, as JSON: all but :data:`NOT_IDENTITY`."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_IDENTITY}
