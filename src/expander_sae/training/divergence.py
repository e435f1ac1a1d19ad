"""The guard against divergence: what a sound loss is, and what to say when it is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

_OF_VARIANCE = 10.0  # a mean loss this many times the variance of the activations is no reconstruction ...
_OF_START = 2.0  # ... unless the run began there: uncentred activations with b_dec at zero do
_RECENT = 10  # steps


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite, or rose far above the variance of the activations.

    The message names step, losses, checkpoint and remedy.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"training diverged: {what}.")
        self.what = what

    def explained(self, tail: Sequence[dict[str, Any]], checkpoint: Path | None) -> TrainingDiverged:
        """The same with the end of the log and the last checkpoint, if there is one."""
        curve = ", ".join(f"{line['step']}: {line['loss']:.4g}" for line in tail) or "none logged yet"
        remedy = "Try a lower lr, scale_activations=True, b_dec_init='mean', or another seed."
        if checkpoint is not None and checkpoint.exists():
            remedy = f"The last good checkpoint is {checkpoint}: `train --from` it with a lower lr. {remedy}"
        full = TrainingDiverged(self.what)
        full.args = (f"training diverged: {self.what}. Logged before (step: loss): {curve}. {remedy}",)
        return full


def check_losses(losses: Sequence[float], first: int, start: float, variance: float, module: nn.Module) -> float:
    """The mean of ``losses``, of the steps from number ``first``.

    Args:
        losses: squared errors, one for each step, at least one.
        first: number of the first of these steps, counted from 1.
        start: squared error of the run's first step, before any update.
        variance: ``mean ‖h - h̄‖²`` of the activations, in the same units.
        module: whose parameters must be finite.

    Raises:
        TrainingDiverged: see there.
    """
    mean, last = sum(losses) / len(losses), first + len(losses) - 1
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        raise TrainingDiverged(f"at step {first + bad} the loss is not finite")
    # A gradient can overflow where the loss does not; such weights must reach no checkpoint.
    if broken := not_finite(module):
        raise TrainingDiverged(f"by step {last} {', '.join(broken)} hold NaN or infinity")
    for recent in (losses, losses[-_RECENT:]):  # a cliff shows in the last steps first: they reach no checkpoint
        level = sum(recent) / len(recent)
        if level > max(_OF_VARIANCE * variance, _OF_START * start):
            raise TrainingDiverged(
                f"from step {last - len(recent) + 1} to {last} the loss is "
                f"{level / start if start else math.inf:.3g} times its start, {level / variance:.3g} times the "
                "variance of the activations"
            )
    return mean


def not_finite(module: nn.Module) -> list[str]:
    """Names of the parameters that hold NaN or infinity."""
    return [name for name, parameter in module.named_parameters() if not bool(parameter.isfinite().all())]
