"""Expansion: brackets that hold, exact values that are exact, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from support.theory import every_deficit, neighbours, polynomial_mask, random_mask

from expander_sae.mask import Mask
from expander_sae.theory import (
    counting_floor,
    ensemble_size,
    expansion,
    expansion_deficit,
    expansion_deficits,
    log_failure,
    sampled_deficits,
)
from expander_sae.theory.expansion import _fewest_rows
from expander_sae.theory.search import pair_threshold, peel

BLOCKS = Mask.from_rows(np.repeat(np.arange(12).reshape(4, 3), 3, axis=0), 12)  # three columns on each support
SMALL = [
    random_mask(*sizes, seed=seed) for sizes in ((12, 14, 3), (20, 14, 4), (9, 12, 4), (40, 13, 3)) for seed in (0, 1)
]
SMALL += [polynomial_mask(5, 3, 2, 14), BLOCKS, Mask.build("balanced", d_in=11, d_sae=13, degree=3, seed=2)]


@pytest.mark.parametrize("mask", SMALL, ids=str)
def test_every_bound_holds_and_exact_is_exact(mask: Mask) -> None:
    truth = every_deficit(mask)
    found = expansion_deficits(mask, mask.d_sae)
    for s, one in enumerate(found, start=1):
        true = int(truth[s - 1])
        assert one.size == s
        assert one.found <= true <= one.bound
        assert all(value >= true for value in one.bounds.values()), one.bounds
        assert one.found == mask.degree * s - neighbours(mask.rows.numpy(), np.array([one.witness]))[0]
        assert len(set(one.witness)) == s
        assert one.lower == Fraction(one.found, mask.degree * s)
        assert one.upper >= counting_floor(mask.d_in, mask.degree, s)
        if s <= 5:
            assert one.exact, one
        lower, upper = expansion(found, s)
        assert lower <= max(Fraction(int(c), mask.degree * (j + 1)) for j, c in enumerate(truth[:s])) <= upper


def test_without_the_exhaustive_search_the_bracket_stays_open() -> None:
    mask = random_mask(128, 512, 5)
    wide = expansion_deficit(mask, 5, budget=0)
    exact = expansion_deficit(mask, 5)
    assert exact.exact
    assert not wide.exact
    assert wide.lower <= exact.lower == exact.upper < wide.upper
    assert "exhaustive" in exact.bounds


def test_the_search_finds_a_planted_set() -> None:
    """Greedy chains need not meet these five columns on six rows; the exhaustive search must."""
    rows = random_mask(400, 1000, 4, seed=3).rows.numpy().copy()
    planted = np.array([[0, 1, 2, 3], [0, 1, 4, 5], [2, 3, 4, 5], [0, 2, 4, 5], [1, 3, 4, 5]])
    rows[[17, 400, 555, 800, 999]] = planted
    mask = Mask.from_rows(rows, 400)
    one = expansion_deficit(mask, 5, starts=1)
    assert one.exact
    assert one.found == 20 - 6
    assert set(one.witness) == {17, 400, 555, 800, 999}


def test_thousands_of_random_sets_violate_no_bound() -> None:
    mask, rng = random_mask(512, 4096, 7), np.random.default_rng(0)
    deficits = expansion_deficits(mask, 40, budget=0)
    rows = mask.rows.numpy()
    ordered = np.lexsort(rows.T[::-1])  # columns that stand beside each other share their first rows
    for s in range(2, 41):
        sets = np.argsort(rng.random((100, 4096)), axis=1)[:, :s]
        sets[:50] = ordered[np.argsort(rng.random((50, 60)), axis=1)[:, :s]]
        collisions = 7 * s - neighbours(rows, sets)
        assert collisions.max() <= deficits[s - 1].bound
    typical = sampled_deficits(mask, 40, 200)
    assert 0 < typical.mean() < float(deficits[39].lower)


def test_what_is_left_after_taking_a_column_away() -> None:
    """T14: some column of every set takes no more than ``2C/s`` of its collisions with it."""
    rng = np.random.default_rng(1)
    rows = random_mask(40, 200, 5).rows.numpy()
    for s in (3, 6, 12):
        sets = np.stack([rng.choice(200, s, replace=False) for _ in range(500)])
        whole = 5 * s - neighbours(rows, sets)
        without = np.stack([5 * (s - 1) - neighbours(rows, np.delete(sets, j, axis=1)) for j in range(s)])
        assert (without.max(axis=0) >= [peel(int(c), s) for c in whole]).all()
    assert pair_threshold(10, 3) == peel(10, 3) == 4
    assert pair_threshold(1, 5) == 1


def test_the_fewest_rows_for_so_many_pairs() -> None:
    """T2: entries spread over rows as evenly as can be make the fewest pairs."""
    edges, pairs = (side.ravel() for side in np.meshgrid(np.arange(1, 25), np.arange(0, 80)))
    for count, most, rows in zip(edges, pairs, _fewest_rows(edges, pairs), strict=True):
        even = [[(count + i) // r for i in range(r)] for r in range(1, count + 1)]
        made = [sum(g * (g - 1) // 2 for g in split) for split in even]
        assert rows == 1 + next(r for r, value in enumerate(made) if value <= most)


def test_disjoint_and_repeated_supports() -> None:
    disjoint = Mask.from_rows(np.arange(30).reshape(10, 3), 30)
    assert all(one.exact and one.upper == 0 for one in expansion_deficits(disjoint, 10))
    repeated = expansion_deficits(BLOCKS, 12)
    assert [one.found for one in repeated] == [3 * s - 3 * -(-s // 3) for s in range(1, 13)]
    assert all(one.exact for one in repeated[:5])
    # Not monotone: one pair on the same rows and a column apart.
    pair = Mask.from_rows(np.array([[0, 1], [0, 1], [2, 3]]), 4)
    deficits = expansion_deficits(pair, 3)
    assert [one.upper for one in deficits] == [0, Fraction(1, 2), Fraction(1, 3)]
    assert expansion(deficits, 3) == (Fraction(1, 2), Fraction(1, 2))


def test_the_same_call_gives_the_same_bracket() -> None:
    mask = random_mask(64, 300, 5)
    assert expansion_deficits(mask, 12, seed=4) == expansion_deficits(mask, 12, seed=4)


def test_what_is_refused() -> None:
    mask = random_mask(20, 14, 4)
    for s in (0, 15):
        with pytest.raises(ValueError, match="from 1 to d_sae = 14 columns"):
            expansion_deficit(mask, s)
    with pytest.raises(ValueError, match="needs the deficits of all these sizes"):
        expansion(expansion_deficits(mask, 3), 4)
    irregular = Mask.build("bernoulli", d_in=20, d_sae=14, degree=4)
    with pytest.raises(ValueError, match="differ in degree"):
        expansion_deficit(irregular, 2)


def test_random_masks_on_the_whole() -> None:
    """The table of T3; ``ε = 1/(2β²)`` at β = 1, 1.25 and 1.5."""
    eps = [Fraction(1, 2) / beta**2 for beta in (Fraction(1), Fraction(5, 4), Fraction(3, 2))]
    table = {
        (512, 4096, 7): [9, 1, 1],
        (512, 4096, 16): [12, 3, 1],
        (512, 4096, 30): [10, 3, 1],
        (2048, 16384, 7): [29, 2, 1],
        (2048, 16384, 30): [38, 7, 2],
        (2048, 16384, 102): [17, 5, 2],
    }
    for sizes, expected in table.items():
        assert [ensemble_size(*sizes, one) for one in eps] == expected


def test_the_union_bound_is_above_the_frequency() -> None:
    m, n, d, s, eps = 24, 10, 3, 2, Fraction(1, 3)
    broken = [expansion_deficits(random_mask(m, n, d, seed), s)[1].upper >= eps for seed in range(300)]
    assert 0.01 < np.mean(broken) <= np.exp(log_failure(m, n, d, s, eps))
    for wrong in (0, 1, 1.5):
        with pytest.raises(ValueError, match="eps must lie in"):
            log_failure(m, n, d, s, wrong)
    with pytest.raises(ValueError, match="probability"):
        ensemble_size(m, n, d, eps, failure=1.0)
