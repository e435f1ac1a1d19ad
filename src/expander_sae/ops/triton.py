"""CUDA kernels in Triton. Not written yet: CUDA tensors take the reference path."""

from __future__ import annotations

import torch


def available(device: torch.device) -> bool:
    """Whether these kernels can run on ``device``."""
    return False


def why_not(device: torch.device) -> str:
    """The reason, for an error message."""
    return "the Triton kernels are not part of this version; use backend='reference'"
