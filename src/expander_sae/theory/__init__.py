"""What can be proven of a mask or a dictionary, and what can be measured where nothing can (docs/theory.md).

from expander_sae.theory import certify, verdict
certificate = certify(sae.dictionary, k=sae.k)
print(verdict(certificate))
"""

from __future__ import annotations

from expander_sae.theory.certificates import (
    KIND,
    Certificate,
    certify,
    dictionary_sha256,
    is_of,
    without_codes,
)
from expander_sae.theory.coherence import Coherence, below_one, coherence, flatness, squared_flatness
from expander_sae.theory.ensemble import ensemble_size, log_failure
from expander_sae.theory.expansion import (
    Deficit,
    counting_floor,
    expansion,
    expansion_deficit,
    expansion_deficits,
    sampled_deficits,
)
from expander_sae.theory.on_codes import Measures, coverage, erc, measure, sigma_min, singular_values
from expander_sae.theory.planted import Recovery, auc, rank_correlation, recover
from expander_sae.theory.survey import NOISE_LEVELS, QUANTILES, SHARES, CodeSurvey, Planted, survey
from expander_sae.theory.verdict import levels, one_line, shown_ends, verdict

__all__ = [
    "KIND",
    "NOISE_LEVELS",
    "QUANTILES",
    "SHARES",
    "Certificate",
    "CodeSurvey",
    "Coherence",
    "Deficit",
    "Measures",
    "Planted",
    "Recovery",
    "auc",
    "below_one",
    "certify",
    "coherence",
    "counting_floor",
    "coverage",
    "dictionary_sha256",
    "ensemble_size",
    "erc",
    "expansion",
    "expansion_deficit",
    "expansion_deficits",
    "flatness",
    "is_of",
    "levels",
    "log_failure",
    "measure",
    "one_line",
    "rank_correlation",
    "recover",
    "sampled_deficits",
    "shown_ends",
    "sigma_min",
    "singular_values",
    "squared_flatness",
    "survey",
    "verdict",
    "without_codes",
]
