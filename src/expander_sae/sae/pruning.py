"""An SAE on supports learned by another: the largest entries of each of its columns."""

from __future__ import annotations

import copy

from expander_sae.dictionary import ExpanderDictionary, prune
from expander_sae.sae.sae import SAE


def pruned(sae: SAE, degree: int) -> SAE:
    """A new SAE whose columns keep the ``degree`` largest entries of those of ``sae``; train it to retune the rest.

    Entries are those in the SAE's basis, which is copied, too. Biases, rule and encoder are copied, and what the
    metadata say of the training: a run that retunes it records that it continues another. The supports are stored, not
    drawn: they count in ``num_bytes``.

    Raises:
        ValueError: ``degree`` outside ``[1, d_in]``, or an untied encoder, whose columns have entries of their own.
    """
    if sae.encoder.num_values:
        raise ValueError("an untied encoder has columns of its own: prune an SAE with a tied encoder or a pursuit")
    mask, values = prune(sae.dictionary.core(), degree)
    dictionary = ExpanderDictionary(mask, values, unit_norm=sae.dictionary.unit_norm)
    dictionary.basis = copy.deepcopy(sae.dictionary.basis)
    kept = {key: copy.deepcopy(sae.metadata[key]) for key in ("trained_on", "training") if key in sae.metadata}
    smaller = SAE(dictionary, copy.deepcopy(sae.encoder), copy.deepcopy(sae.sparsity), kept)
    smaller.b_dec.data.copy_(sae.b_dec.data)
    return smaller.to(device=sae.b_dec.device).train(sae.training)
