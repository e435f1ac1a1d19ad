"""The certificate of an SAE: theory on its dictionary, and on the codes it makes of activations."""

from __future__ import annotations

import torch

from expander_sae.data.sources import ActivationSource
from expander_sae.ops import SparseCode
from expander_sae.sae import SAE
from expander_sae.theory import Certificate, CodeSurvey, certify, survey

_ROWS_AT_ONCE = 2048


def certify_sae(
    sae: SAE, *, k: int | None = None, source: ActivationSource | None = None, name: str = "", rows: int = 1024,
    seed: int = 0,
) -> Certificate:  # fmt: skip
    """What is guaranteed for an SAE's dictionary, and what its own codes are like.

    Args:
        sae: any.
        k: active features at which it is used; default the SAE's own.
        source: activations to survey codes of. They should not be those it was trained on.
        name: of the source, kept with the figures.
        rows: activations to draw from the source, fewer if it has fewer.
        seed: of the draw, the noise and the search.

    Raises:
        ValueError: a source of another width, ``k`` or ``rows`` out of range.
    """
    codes = None if source is None else _survey(sae, source, name, rows, seed)
    return certify(sae.dictionary, sae.k if k is None else k, codes=codes, seed=seed)


@torch.no_grad()
def _survey(sae: SAE, source: ActivationSource, name: str, rows: int, seed: int) -> CodeSurvey:
    if source.d_in != sae.d_in:
        raise ValueError(f"the activations have width {source.d_in}, the SAE reads d_in = {sae.d_in}")
    h = source.sample(min(rows, len(source)), seed).to(sae.b_dec)
    codes, residuals = [], []
    for part in h.split(_ROWS_AT_ONCE):
        code = sae.encode(part)
        codes.append(code)
        residuals.append((part.double() - sae.decode(code).double()).norm(dim=1))
    whole = SparseCode(torch.cat([code.indices for code in codes]), torch.cat([code.values for code in codes]))
    matrix = sae.dictionary.matrix()
    return survey(matrix, whole, torch.cat(residuals), source=name, encoder=sae.encoder.kind, seed=seed)
