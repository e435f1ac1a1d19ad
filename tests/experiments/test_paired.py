"""Paired comparisons over seeds."""

from __future__ import annotations

import pytest
from scipy import stats

from expander_sae.experiments.common.paired import holm, paired, what_seeds_can_show


def test_the_differences_are_taken_seed_by_seed() -> None:
    arm, reference = {0: 1.1, 1: 2.2, 2: 3.15, 7: 9.0}, {2: 3.0, 1: 2.0, 0: 1.0, 8: 5.0}
    found = paired(arm, reference)
    expected = stats.ttest_rel([1.1, 2.2, 3.15], [1.0, 2.0, 3.0])
    assert (found.seeds, found.p) == (3, pytest.approx(expected.pvalue))
    assert found.mean == pytest.approx(0.15)
    assert stats.ttest_ind([1.1, 2.2, 3.15], [1.0, 2.0, 3.0]).pvalue > 10 * expected.pvalue, "pairing is what tells"


def test_what_cannot_be_tested() -> None:
    assert paired({0: 2.0}, {0: 1.0}).p is None
    assert paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).p is None, "equal differences have no spread"
    with pytest.raises(ValueError, match="no seed in common"):
        paired({0: 1.0}, {1: 1.0})


def test_holm() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_seeds_can_show() -> None:
    said = what_seeds_can_show(3)
    assert "2.5 times its deviation" in said
    assert "p = 0.25" in said
    exact = [-2.49, 0.0, 2.49]  # deviation 2.49, and a mean that many times as large as the sentence says
    ratio = stats.t.ppf(0.975, 2) / 3**0.5
    assert paired({s: x + ratio * 2.49 for s, x in enumerate(exact)}, dict.fromkeys(range(3), 0.0)).p == pytest.approx(
        0.05
    )
    assert "no test" in what_seeds_can_show(1)
