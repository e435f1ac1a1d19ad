"""Figures of the paper that ours stand beside, computed from the result files its author published.

The paper: arXiv 2607.01799. The files: ``results`` of ``rodrgo/expander-sae`` on GitHub, commit 598f59a (MIT). All of
them: Pythia-70M layer 3, m = 512, n = 4096, k = 64, 5000 steps of 256; three seeds, two of clustered masks at d = 200.
Means with sample deviations, where a figure has ``_sd`` beside it.
"""

from __future__ import annotations

from typing import Any

WHERE = "Pythia-70M layer 3, m = 512, n = 4096, k = 64"
MASKS = {"left-regular": "expander_tied", "clustered": "clustered_sparse", "learned": "pruned_retuned_dense"}
"""Our names of the masks, and the paper's of its SAEs on them."""

_CONTROLS = """
left-regular  7 .5322 .0011 .8173 .0022 .4240 .0031 .0015
left-regular 30 .5027 .0023 .8512 .0010 .3953 .0047 .0031
left-regular 50 .4891 .0053 .8594 .0040 .3877 .0019 .0029
left-regular 100 .4529 .0004 .8819 .0008 .3687 .0011 .0059
left-regular 200 .4153 .0009 .9022 .0009 .3429 .0023 .0067
clustered  7 .5308 .0025 .8096 .0018 .4558 .0008 .0044
clustered 50 .4781 .0011 .8671 .0006 .4076 .0033 .0148
clustered 200 .5182 .0173 .8290 .0229 .4468 .0002 .0620
learned  7 .5201 .0017 .8290 .0016 .4164 .0027 .0031
learned 50 .4497 .0071 .8846 .0080 .3540 .0024 .0040
learned 200 .3628 .0037 .9343 .0012 .2970 .0012 .0036
"""
# benchmark_db.json: rel_err_mean and ce_recovered of the encoder, rel_err_mean of OMP (signed), dead_frac.

_GEOMETRY = """
left-regular 7 1.563 2.063 2.643 20.89 .663 .7533 597.5 10.51
left-regular 30 2.260 2.984 5.412 17.13 .7978 .8862 3014 52.06
left-regular 50 2.464 3.201 6.917 16.08 .8611 .9264 5315 86.68
left-regular 100 2.707 3.466 7.444 11.82 .9248 .9614 6746 81.39
left-regular 200 2.955 3.751 8.885 10.67 .9613 .9803 10240 263.5
clustered 7 1.816 2.371 2.638 28.12 .9846 - 883.8 -
clustered 50 2.517 3.344 6.862 19.03 .9846 - 5981 -
clustered 200 2.952 3.725 7.906 14.40 .9846 - 8093 -
learned 7 1.510 1.987 2.643 21.50 .7267 - 655.0 -
learned 50 2.159 2.745 4.611 10.64 .8634 - 2393 -
learned 200 2.379 2.923 6.632 10.31 .9614 - 5554 -
"""
# benchmark_db.json: its eps are the worst sets a search found, so lower ends; those of 2k columns and R_id of seed 0.

_COLLISIONS = """
left-regular 7 288.68 1.49 .3556 .0033
left-regular 50 511.25 .03 .8402 .0000
left-regular 200 512.00 .00 .9600 .0000
clustered 7 263.75 3.59 .4113 .0080
clustered 50 497.27 .28 .8446 .0001
clustered 200 400.00 .00 .9688 .0000
learned 7 268.45 1.32 .4008 .0029
learned 50 510.29 .03 .8405 .0000
learned 200 512.00 .00 .9600 .0000
"""
# active_support_collisions.json, 2,000 held-out tokens: coverage_mean and deficit_mean.

SYNTHETIC_KS = (4, 8, 16, 32, 64, 128)
SYNTHETIC: dict[tuple[int, float], tuple[tuple[int, int], ...]] = {
    (7, 0.0): ((300, 300), (300, 300), (300, 300), (300, 300), (297, 300), (41, 300)),
    (7, 0.01): ((299, 300), (292, 300), (270, 300), (239, 300), (141, 300), (2, 300)),
    (7, 0.05): ((286, 300), (252, 300), (197, 300), (73, 300), (6, 300), (0, 300)),
    (30, 0.0): ((300, 300), (300, 300), (220, 220), (300, 300), (220, 220), (99, 300)),
    (30, 0.01): ((299, 300), (294, 300), (272, 300), (243, 300), (137, 300), (13, 300)),
    (30, 0.05): ((281, 300), (250, 300), (193, 300), (74, 300), (7, 300), (0, 300)),
    (50, 0.0): ((300, 300), (300, 300), (300, 300), (300, 300), (300, 300), (123, 300)),
    (50, 0.01): ((299, 300), (294, 300), (273, 300), (244, 300), (135, 300), (9, 300)),
    (50, 0.05): ((286, 300), (247, 300), (190, 300), (83, 300), (3, 300), (0, 300)),
    (100, 0.0): ((300, 300), (300, 300), (300, 300), (300, 300), (300, 300), (119, 300)),
    (100, 0.01): ((298, 300), (293, 300), (269, 300), (246, 300), (135, 300), (7, 300)),
    (100, 0.05): ((287, 300), (247, 300), (193, 300), (79, 300), (5, 300), (0, 300)),
    (200, 0.0): ((300, 300), (300, 300), (300, 300), (300, 300), (300, 300), (114, 300)),
    (200, 0.01): ((299, 300), (293, 300), (271, 300), (245, 300), (145, 300), (20, 300)),
    (200, 0.05): ((282, 300), (247, 300), (191, 300), (69, 300), (7, 300), (0, 300)),
}
"""``synthetic_db.json``, left-regular masks, flat signed values, m = 512, n = 4096: by degree and noise, the problems
whose support OMP found out of all, for each of :data:`SYNTHETIC_KS`; over three masks."""
SYNTHETIC_SIZE = (512, 4096)


def _rows(table: str, figures: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for line in table.split("\n")[1:-1]:
        mask, degree, *numbers = line.split()
        found = (None if number == "-" else float(number) for number in numbers)
        rows.append({"mask": mask, "degree": int(degree)} | dict(zip(figures, found, strict=True)))
    return rows


def controls() -> list[dict[str, Any]]:
    """A row for each mask and degree: relative error, CE recovered, relative error of signed OMP, dead share."""
    ours = ("relative_error", "ce_recovered", "signed_omp_relative_error")
    return _rows(_CONTROLS, (*(name for one in ours for name in (one, f"{one}_sd")), "dead_share"))


def geometry() -> list[dict[str, Any]]:
    """A row for each mask and degree: flatness, ``μ₁(k)``, ``ε`` of ``k + 1`` and ``2k`` columns, both ratios."""
    quantiles = ("beta_median", "beta_95", "beta_max")
    return _rows(_GEOMETRY, (*quantiles, "mu1", "eps_omp_lower", "eps_id_lower", "r_omp_lower", "r_id_lower"))


def collisions() -> list[dict[str, Any]]:
    """A row for each mask and degree: rows touched by the active columns, and what share of their edges is lost."""
    return _rows(_COLLISIONS, ("coverage", "coverage_sd", "deficit", "deficit_sd"))
