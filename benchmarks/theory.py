"""What a certificate costs: exact coherence, expansion bracketed, of a random mask with Gaussian values."""

from __future__ import annotations

import time

import torch

from benchmarks.cases import Shape
from benchmarks.measure import Row, Settings, memory, reset_peak
from expander_sae.dictionary import ExpanderMatrix
from expander_sae.mask import Mask
from expander_sae.theory import certify, one_line


def run(shape: Shape, settings: Settings) -> list[Row]:
    """One turn: it takes seconds to minutes. Peak memory is that of the whole process."""
    del settings  # threads are set already; there is nothing to repeat
    mask = Mask.build("left-regular", d_in=shape.d_in, d_sae=shape.d_sae, degree=shape.degree)
    values = torch.randn(mask.rows.shape, generator=torch.Generator().manual_seed(0))
    reset_peak()
    start = time.perf_counter()
    certificate = certify(ExpanderMatrix(mask.rows, values, shape.d_in), shape.k)
    seconds = [time.perf_counter() - start]
    return [Row("theory", str(shape), "certify", True, 1, seconds, memory("VmHWM"), note=one_line(certificate))]
