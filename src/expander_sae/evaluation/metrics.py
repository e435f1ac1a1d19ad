"""Every metric that needs no language model, defined once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expander_sae.data.sources import ActivationSource
from expander_sae.ops import SparseCode
from expander_sae.sae import SAE

_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Reconstruction:
    """How well codes rebuild a set of activations ``h`` (``N`` vectors).

    Attributes:
        relative_error: mean over samples of ``‖h - ĥ‖ / ‖h‖`` (uncentred; zero vectors are left out of the mean).
        fvu: ``Σ‖h - ĥ‖² / Σ‖h - h̄‖²`` with ``h̄`` the mean over the whole set: mean predictor 1, perfection 0.
        l0: mean number of nonzero coefficients a sample.
        silent: features that fired (nonzero) for none of the ``tokens``; with few tokens far more than are dead.
        tokens: ``N``.
    """

    relative_error: float
    fvu: float
    l0: float
    silent: int
    tokens: int


class ReconstructionMeter:
    """Accumulates :class:`Reconstruction` over batches, in float64."""

    def __init__(self, d_sae: int) -> None:
        self.fired = torch.zeros(d_sae, dtype=torch.bool)
        self.origin: Tensor | None = None  # sums are taken about the first batch's mean: no cancellation
        self.first = torch.zeros(())
        self.second = self.error = self.relative = self.active = 0.0
        self.tokens = self.nonzero_rows = 0

    def add(self, h: Tensor, recon: Tensor, code: SparseCode) -> None:
        """``h`` and ``recon`` ``(b, m)``, ``code`` of the same ``b`` samples."""
        if h.shape[0] == 0:
            return
        h, recon = h.detach().double().cpu(), recon.detach().double().cpu()
        if self.origin is None:
            self.origin = h.mean(dim=0)
            self.first = torch.zeros_like(self.origin)
        centred = h - self.origin
        self.first += centred.sum(dim=0)
        self.second += float(centred.square().sum())
        error = (h - recon).square().sum(dim=1)
        self.error += float(error.sum())
        norm = h.norm(dim=1)
        self.relative += float((error.sqrt() / norm)[norm > 0].sum())
        self.nonzero_rows += int((norm > 0).sum())
        active = code.values != 0
        self.active += float(active.sum())
        self.fired[code.indices[active].long().cpu()] = True
        self.tokens += h.shape[0]

    def result(self) -> Reconstruction:
        """Raises ``ValueError`` when nothing was added, or every activation is the same (FVU is then undefined)."""
        if not self.tokens:
            raise ValueError("no activations to evaluate")
        variance = self.second - float(self.first.square().sum()) / self.tokens
        if variance <= 0:
            raise ValueError(
                f"all {self.tokens} activations are equal: the fraction of variance unexplained is undefined"
            )
        return Reconstruction(
            relative_error=self.relative / max(1, self.nonzero_rows),
            fvu=self.error / variance,
            l0=self.active / self.tokens,
            silent=int((~self.fired).sum()),
            tokens=self.tokens,
        )


@torch.no_grad()
def reconstruction(sae: SAE, source: ActivationSource) -> Reconstruction:
    """:class:`Reconstruction` of every row of ``source``."""
    if source.d_in != sae.d_in:
        raise ValueError(f"the activations have width {source.d_in}, the SAE reads d_in = {sae.d_in}")
    meter = ReconstructionMeter(sae.d_sae)
    for start in range(0, len(source), _ROWS_AT_ONCE):
        h = source.rows(slice(start, start + _ROWS_AT_ONCE)).to(sae.b_dec.device)
        code = sae.encode(h)
        meter.add(h, sae.decode(code), code)
    return meter.result()


def ce_recovered(ce_clean: float, ce_zero: float, ce_recon: float) -> float | None:
    """``(CE_zero - CE_recon) / (CE_zero - CE_clean)``: 1 is as good as untouched, 0 as bad as zeros.

    ``None`` where zero ablation does not raise the cross-entropy: the ratio would say nothing.
    """
    return (ce_zero - ce_recon) / (ce_zero - ce_clean) if ce_zero > ce_clean else None
