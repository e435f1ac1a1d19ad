"""Every construction keeps its promise, draws frozen bits, and refuses what does not fit with the bound it breaks."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction
from math import comb
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from expander_sae.mask import CONSTRUCTIONS, Mask, MaskRecipe, algebraic, sampled
from expander_sae.mask.draws import words

# Frozen when the kinds were made. A change here makes stored SAEs unreadable: raise the construction's version instead.
GOLDEN = {
    ("bernoulli", 512, 4096, 7, 0, ()): "42b223d2c8cdcf82b7d404de31bba7fd3b4d6e25a8fa6aebcce3081d31f0b64a",
    ("bernoulli", 576, 4608, 30, 17, ()): "f4ba09bf99aa3a59ab6f06ad8d16d2470f4ecb430bcd65fb0103a75b697bb69e",
    ("bernoulli", 5, 9, 2, 2**64 - 1, ()): "fe3f54550df0ac85673252a545b9b1524b4df2f2c77cf8d2b50146c2b75b942a",
    ("weighted", 512, 4096, 7, 0, ()): "251ba593a5e3e269d1f0ba8235508fe97a1c1f54919a00ca76bb934867cb8f82",
    (
        "weighted",
        576,
        4608,
        30,
        17,
        (("alpha", 1.0), ("floor", 0.0)),
    ): "03b229e2a8aac2e04a4324ea808b982b27b7bc2430a2ff33175fd2ba5321d8a0",
    (
        "weighted",
        5,
        9,
        3,
        2**64 - 1,
        (("weights", (3, 0.1, 2.5, 0.001, 7)),),
    ): "c4d77758db39d005a48349043e01748023fd1539e4a27ba46160ad6e85878b54",
    ("reed-solomon", 512, 4096, 7, 0, ()): "d625a2d57dc05ec83fb5d41491c45dc2267077c3ec3556d80d4b71d42d726604",
    ("reed-solomon", 576, 4608, 16, 17, ()): "efb9878fa7b22138d0425bfbd0085539813525101107f792a1f08f872ba0307d",
    (
        "reed-solomon",
        2048,
        16384,
        7,
        0,
        (("permute", False),),
    ): "9b49a49dc1efcef39f843499804c8897149eb57290b762700f7df7c6181688fa",
    (
        "reed-solomon",
        20,
        30,
        3,
        2**64 - 1,
        (("overlap", 2),),
    ): "cbf34fabf26bb3ecb37144968bbe2d2c189b34311906e52a230f2eca69a015f4",
    ("gf2", 512, 4096, 8, 0, ()): "7ab9d66574f62f158597c618003b28b4c72e99717c68b355d5e3a02252892010",
    (
        "gf2",
        2048,
        16384,
        16,
        17,
        (("permute", False),),
    ): "56365c284689bf61150901c9131c0f9116915f2891f83d9ce05257225e18d9d6",
    ("gf2", 64, 400, 8, 2**64 - 1, ()): "12274e243bf47e354bcd0eb42bc9be995858bad3ad7913151cc4422f588557a9",
    ("clustered", 512, 4096, 7, 0, ()): "7316fccd551cea9e5d5970d02af7f0ae616150cc3393db8e37ac7f69cf2ba5f1",
    ("clustered", 576, 4608, 30, 17, ()): "e063b9c2ea70400aec83b131aa066bfd6c67e2421a89c9440bf1b8729c2e9bed",
    ("clustered", 5, 9, 2, 2**64 - 1, ()): "e83453001e03372ba692919a59f3b08254257f5deb1fbdb84aa4dc39acd4648e",
    ("shared", 512, 4096, 7, 0, ()): "1092afef27836bec5f52e76f0e40dc0ddeb83547c4c73468083058b500357345",
    (
        "shared",
        576,
        4608,
        30,
        17,
        (("supports", 100),),
    ): "ba34474eeab9dd25d80d3b4785b5c4e5a859c759ff08a03d6c7ec0a758b08e9d",
    ("shared", 5, 9, 2, 2**64 - 1, ()): "403c87520ae34ec907a0ac40cf1c1ed48cbba50d6f08a2894ae2f948cf6d37f4",
    ("banded", 512, 4096, 7, 0, ()): "8b65f018b773266a485c47f17234596cfd6c102ffb18cbc44138589a9144d2b5",
    ("banded", 576, 4608, 30, 17, ()): "f79e00e6dcdd39b7fd6ab1ef26295bbd6c86cc988035fd63d9b61db791d62442",
    ("banded", 5, 9, 2, 2**64 - 1, ()): "6dbc28738a8713f7de6fa6b76730b5f3b9f91e5586a92b03f31a8055287b6344",
    ("hub", 512, 4096, 7, 0, ()): "4da123ca4f100191f3fa8ec338bb2543f85bdd7e5c357ea4568a6077f712ccb7",
    ("hub", 576, 4608, 30, 17, (("alpha", 0.5),)): "f51d9fa4a71d26392ca15bad395cbefdec1a923619b68b8551ebb34fb361f997",
    ("hub", 5, 9, 2, 2**64 - 1, ()): "71a3f333888d106d21b8de3b104c8f6ebace7c4301f3a33736c1a2c3a2d62ffa",
}


def build(kind: str, m: int, n: int, d: int, seed: int = 0, **options: Any) -> Mask:
    return Mask.build(kind, d_in=m, d_sae=n, degree=d, seed=seed, **options)


@pytest.mark.parametrize(("recipe", "sha256"), GOLDEN.items(), ids=str)
def test_golden_hashes(recipe: tuple[Any, ...], sha256: str) -> None:
    kind, m, n, d, seed, options = recipe
    mask = build(kind, m, n, d, seed, **dict(options))
    assert mask.sha256 == sha256
    assert Mask.from_recipe(MaskRecipe(kind, m, n, d, seed, dict(options))).sha256 == sha256


def test_threads_do_not_change_a_draw() -> None:
    before, recipes = torch.get_num_threads(), list(GOLDEN)[::3]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for kind, m, n, d, seed, options in recipes:
                assert build(kind, m, n, d, seed, **dict(options)).sha256 == GOLDEN[kind, m, n, d, seed, options]
    finally:
        torch.set_num_threads(before)


def test_every_kind_has_golden_hashes_and_names_its_source() -> None:
    elsewhere = {"left-regular", "balanced"}  # test_mask.py
    assert {recipe[0] for recipe in GOLDEN} | elsewhere == set(CONSTRUCTIONS)
    for kind, construction in CONSTRUCTIONS.items():
        where = (construction.draw.__doc__ or "") + (algebraic.__doc__ or "") * (kind in ("reed-solomon", "gf2"))
        assert "Source" in where, kind


# The draws again, word by word in plain integers.


def plain_weighted(units: list[int], n: int, d: int, seed: int) -> list[list[int]]:
    drawn = iter(words(seed, 0, n * d).tolist())
    columns = []
    for _ in range(n):
        left = dict(enumerate(units))
        for _ in range(d):
            point = next(drawn) * sum(left.values()) >> 64
            ends = itertools.accumulate(left.values())
            del left[next(row for row, end in zip(list(left), ends, strict=True) if point < end)]
        columns.append(sorted(set(range(len(units))) - left.keys()))
    return columns


def plain_bernoulli(m: int, n: int, d: int, seed: int) -> list[list[int]]:
    chance = [Fraction(comb(m, c) * d**c * (m - d) ** (m - c), m**m) for c in range(m + 1)]
    limits = [2**64 * sum(chance[1 : c + 1]) / (1 - chance[0]) for c in range(m)]  # of counts up to c
    counts = [sum(word >= int(limit) for limit in limits) for word in words(seed, 1, n).tolist()]
    width = max(counts)
    rows = Mask.build("left-regular", d_in=m, d_sae=n, degree=width, seed=seed).rows.tolist()
    keys = words(seed, 2, n * width).reshape(n, width).tolist()
    return [
        sorted(row for _, row in sorted(zip(key, column, strict=True))[:count])
        for key, column, count in zip(keys, rows, counts, strict=True)
    ]


def held_rows(mask: Mask) -> list[list[int]]:
    held = torch.ones_like(mask.rows, dtype=torch.bool) if mask.held is None else mask.held
    return [column[there].tolist() for column, there in zip(mask.rows, held, strict=True)]


small = st.tuples(st.integers(1, 12), st.integers(1, 20), st.integers(1, 12), st.integers(0, 2**64 - 1)).filter(
    lambda size: size[2] <= size[0]
)


@given(size=small, weights=st.lists(st.integers(0, 50), min_size=12, max_size=12), floor=st.sampled_from([0, 0.25, 1]))
def test_weighted_draws_in_proportion_to_what_is_left(size: Any, weights: list[int], floor: float) -> None:
    m, n, d, seed = size
    weights = weights[:m]
    assume(any(weights))
    share = Fraction(floor)
    exact = [2**30 * ((1 - share) * Fraction(weight, sum(weights)) + share / m) for weight in weights]
    units = [round(unit) for unit in exact]
    assume(sum(unit > 0 for unit in units) >= d)
    mask = build("weighted", m, n, d, seed, weights=weights, alpha=1, floor=floor)
    assert mask.rows.tolist() == plain_weighted(units, n, d, seed)


@given(size=small)
def test_bernoulli_draws_counts_and_then_sets(size: Any) -> None:
    m, n, d, seed = size
    mask = build("bernoulli", m, n, d, seed)
    assert held_rows(mask) == plain_bernoulli(m, n, d, seed)
    assert mask.num_entries == int(mask.counts.sum()) == int(mask.row_degrees().sum()) == int(mask.to_dense().sum())
    assert mask.counts.min() >= 1
    assert mask.degree == mask.counts.max()


def chi_square(found: np.ndarray, expected: np.ndarray) -> float:
    return float(((found - expected) ** 2 / expected).sum())


def test_every_entry_of_a_bernoulli_mask_is_there_independently() -> None:
    m, n, d = 6, 40_000, 2
    seen = Counter(tuple(column) for column in held_rows(build("bernoulli", m, n, d, seed=3)))
    supports = [support for c in range(1, m + 1) for support in itertools.combinations(range(m), c)]
    empty = (1 - d / m) ** m
    expected = np.array([n * (d / m) ** len(s) * (1 - d / m) ** (m - len(s)) / (1 - empty) for s in supports])
    assert chi_square(np.array([seen[support] for support in supports]), expected) < 103.4  # .999, 62 degrees


def test_counts_of_a_bernoulli_mask_at_the_papers_size() -> None:
    counts = build("bernoulli", 512, 4096, 7).counts.double()
    assert counts.mean() == pytest.approx(7 / (1 - (1 - 7 / 512) ** 512), abs=4 * (7 / 4096) ** 0.5)
    assert counts.var() == pytest.approx(7 * (1 - 7 / 512), rel=0.1)


def test_frequencies_of_a_weighted_mask() -> None:
    """Successive sampling of two rows in four: P{i, j} = p_i p_j / (1 - p_i) + p_i p_j / (1 - p_j)."""
    n, weights, alpha, floor = 40_000, [9.0, 4.0, 1.0, 0.0], 0.5, 0.2
    power = np.array(weights) ** alpha
    p = (1 - floor) * power / power.sum() + floor / 4
    seen = Counter(map(tuple, build("weighted", 4, n, 2, weights=weights, alpha=alpha, floor=floor).rows.tolist()))
    pairs = list(itertools.combinations(range(4), 2))
    expected = np.array([p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j])) * n for i, j in pairs])
    assert chi_square(np.array([seen[pair] for pair in pairs]), expected) < 20.5  # .999, 5 degrees


def test_weights_are_a_power_law_over_ranked_rows_unless_given() -> None:
    ranks = [1 / (i + 1) for i in range(64)]
    drawn = build("weighted", 64, 4000, 1, alpha=1.5, floor=0.0)
    power = np.array(ranks) ** 1.5
    assert chi_square(drawn.row_degrees().numpy(), 4000 * power / power.sum()) < 103.4
    assert build("weighted", 64, 50, 5).rows.tolist() == build("weighted", 64, 50, 5, weights=ranks).rows.tolist()
    even = sampled.in_units(64, None, 0, 0.1)
    assert even.tolist() == [2**30 // 64] * 64


def test_weights_may_be_an_array_and_stay_in_the_recipe() -> None:
    weights = np.linspace(1, 2, 30)
    mask = build("weighted", 30, 20, 4, weights=weights)
    assert mask.recipe is not None
    assert mask.recipe.options == {"weights": weights.tolist()}
    assert build("weighted", 30, 20, 4, weights=torch.from_numpy(weights)).sha256 == mask.sha256
    assert Mask.from_recipe(mask.recipe).sha256 == mask.sha256


# Bounded overlap.

fields = st.tuples(st.integers(1, 9), st.integers(0, 40), st.integers(1, 400), st.integers(0, 9))


@given(size=fields)
def test_reed_solomon_keeps_its_overlap_on_any_sizes(size: Any) -> None:
    d, more, n, seed = size
    m = d * d + more
    if not fits("reed-solomon", m, n, d):
        return
    mask = build("reed-solomon", m, n, d, seed)
    most = mask.overlap().maximum
    assert n <= algebraic.johnson_bound(m, d, most)
    allowed = next(overlap for overlap in range(d) if fits("reed-solomon", m, n, d, overlap=overlap))
    assert most <= allowed
    assert build("reed-solomon", m, n, d, seed, overlap=allowed).sha256 == mask.sha256


def fits(kind: str, m: int, n: int, d: int, **options: Any) -> bool:
    try:
        build(kind, m, n, d, **options)
    except ValueError as error:
        if "is not to be had" in str(error):
            return False
        raise
    return True


def plain_reed_solomon(m: int, n: int, d: int, seed: int) -> list[list[int]]:
    """As docs/formats.md has it."""

    def by_word(stream: int, count: int) -> list[int]:
        keys = words(seed, stream, count).tolist()
        return sorted(range(count), key=lambda i: keys[i])

    def supports(q: int, t: int) -> list[list[int]] | None:
        left_out = {(i % d, q - 1 - i // d) for i in range(d * q - m)}
        number = {
            pair: i for i, pair in enumerate((b, y) for b in range(d) for y in range(q) if (b, y) not in left_out)
        }
        slopes, columns = by_word(1, q), []
        for g in range(min(q ** (t - 1), -(-64 * n // q**2) * q)):
            c = [g // q**i % q for i in range(t - 1)]
            c = [slopes[c[0]], *c[1:]] if c else []
            for c0 in range(q):
                pairs = [(b, (c0 + sum(ci * b ** (i + 1) for i, ci in enumerate(c))) % q) for b in range(d)]
                if not left_out.intersection(pairs):
                    columns.append([number[pair] for pair in pairs])
        s = min(q, n)
        u = min(s, max(1, n * d // m)) if t > 1 else 1
        p, spare = s // u, max(0, m - d * q)
        groups = -(-spare // p)
        if len(columns) < n or groups > n // s:
            return None
        for i in range(spare):
            first = i // p * (n // s // groups) * s + i % p * u
            for j in range(first, first + u):
                columns[j][(j + i) % d] = d * q + i
        return columns[:n]

    primes = [q for q in range(2, 2 * m + 3) if all(q % e for e in range(2, q))]
    above = min(q for q in primes if q >= d and q * d >= m)
    fields = sorted({above, max((q for q in primes if d <= q and q * d <= m), default=above)}, reverse=True)
    for t in range(1, d + 1):
        found = [columns for q in fields if n <= q**t and (columns := supports(q, t))]
        if found:
            degrees = [Counter(itertools.chain(*columns)) for columns in found]
            spreads = [max(use[row] for row in range(m)) - min(use[row] for row in range(m)) for use in degrees]
            rows = by_word(0, m)
            return [sorted(rows[i] for i in column) for column in found[spreads.index(min(spreads))]]
    return []


@given(d=st.integers(1, 5), more=st.integers(0, 12), n=st.integers(1, 60), seed=st.integers(0, 9))
def test_reed_solomon_is_the_documented_draw(d: int, more: int, n: int, seed: int) -> None:
    m = d * d + more
    rows = plain_reed_solomon(m, n, d, seed)
    if rows:
        assert build("reed-solomon", m, n, d, seed).rows.tolist() == rows
    else:
        assert not fits("reed-solomon", m, n, d)


def test_slopes_are_spread() -> None:
    """Consecutive slopes leave a second singular value far above a random mask's: docs/masks.md."""

    def second_square(mask: Mask) -> float:
        dense = mask.to_dense().double()
        return float(torch.linalg.eigvalsh(dense @ dense.T)[-2])

    random = second_square(build("balanced", 512, 1024, 7))
    assert second_square(build("reed-solomon", 512, 1024, 7)) < 1.3 * random
    assert second_square(build("reed-solomon", 512, 1024, 7, permute=False)) > 1.6 * random


@given(r=st.integers(0, 5), d=st.integers(1, 32), n=st.integers(1, 500), seed=st.integers(0, 9))
def test_gf2_fits_exactly(r: int, d: int, n: int, seed: int) -> None:
    q = 1 << r
    assume(d <= q)
    t = next((t for t in range(1, d + 1) if n <= q**t), None)
    if t is None:
        with pytest.raises(ValueError, match="is not to be had"):
            build("gf2", d * q, n, d, seed)
        return
    mask = build("gf2", d * q, n, d, seed)
    assert mask.overlap().maximum <= t - 1
    assert mask.row_degrees().max() - mask.row_degrees().min() <= (n % q > 0)


def test_rows_of_gf2_are_those_of_its_docstring() -> None:
    mask = build("gf2", 4 * 8, 100, 4, permute=False)

    def product(a: int, b: int) -> int:  # in GF(8): x³ = x + 1
        result = 0
        for bit in range(3):
            result ^= (a << bit) * (b >> bit & 1)
        for bit in (4, 3):
            result ^= (0b1011 << (bit - 3)) * (result >> bit & 1)
        return result

    for j, column in enumerate(mask.rows.tolist()):
        c = [j // 8**i % 8 for i in range(3)]
        assert column == [8 * b + (c[0] ^ product(b, c[1]) ^ product(product(b, b), c[2])) for b in range(4)]


@pytest.mark.parametrize("degree", range(1, 14))
def test_gf2_computes_in_a_field(degree: int) -> None:
    modulus = algebraic.irreducible(degree)
    everything = np.arange(1 << min(degree, 8), dtype=np.int64)
    table = algebraic.multiply(everything[:, None], everything[None, :], modulus)
    assert (table == table.T).all()
    assert (table[1:, 1:] > 0).all()  # no divisors of zero
    assert table[1].tolist() == everything.tolist()
    if degree == 8:
        assert modulus == 0x11B


def test_known_sizes() -> None:
    """Sizes of SAEs, with the spread of row degrees."""
    for m, n, d, overlap, degrees in [
        (512, 4096, 7, 1, (55, 57)),
        (2048, 16384, 7, 1, (53, 57)),
        (768, 6144, 7, 1, (53, 57)),
        (576, 4608, 7, 1, (54, 59)),
        (512, 4096, 16, 2, (110, 142)),
    ]:
        mask = build("reed-solomon", m, n, d)
        found = mask.row_degrees()
        assert (mask.overlap().maximum, (int(found.min()), int(found.max()))) == (overlap, degrees)
    for m, n, d, overlap in [(512, 4096, 8, 1), (2048, 16384, 16, 1), (1024, 16384, 8, 1), (576, 4608, 9, 2)]:
        mask = build("gf2", m, n, d)
        assert mask.overlap().maximum == overlap
        assert mask.row_degrees().unique().tolist() == [n * d // m]


def test_johnson_bound() -> None:
    assert algebraic.johnson_bound(512, 7, 1) == 6217
    assert algebraic.johnson_bound(2048, 7, 1) == 99_766
    assert algebraic.johnson_bound(512, 16, 1) == 1088
    assert algebraic.johnson_bound(7, 3, 1) == 7  # the Fano plane reaches it


@pytest.mark.parametrize(
    ("kind", "sizes", "options", "message"),
    [
        ("reed-solomon", (576, 4608, 30), {}, "degree <= q <= d_in / degree.*degree 30 is above 24, the largest"),
        (
            "reed-solomon",
            (512, 4096, 16),
            {"overlap": 1},
            "no mask at all has more than 1,088 .*Johnson.*overlap=2 fits",
        ),
        ("reed-solomon", (512, 6000, 7), {"overlap": 1}, r"q\*\*2 = 6,241 polynomials, less those .*overlap=2 fits"),
        ("reed-solomon", (10, 11, 1), {}, "no mask at all has more than 10 columns .*a smaller d_sae would"),
        ("reed-solomon", (512, 4096, 7), {"overlap": 7}, "overlap must be an integer from 0 to degree - 1 = 6, got 7"),
        ("reed-solomon", (512, 4096, 7), {"overlap": 1.0}, "overlap must be an integer"),
        ("gf2", (576, 4608, 7), {}, "power of two that is at least degree: degree 7 does not fit .*9 and 18 would"),
        ("gf2", (577, 4608, 7), {}, "no degree does, use reed-solomon"),
        ("gf2", (512, 4097, 8), {"overlap": 1}, r"q\*\*2 = 4,096 polynomials.*overlap=2 fits"),
        ("gf2", (8, 9, 1), {}, "no mask at all has more than 8 columns"),
        ("weighted", (4, 5, 2), {"weights": [1, 2, 3]}, "one number for each of the 4 rows, got 3"),
        ("weighted", (3, 5, 2), {"weights": [1, -2, 3]}, "finite and not negative, weight 1 is -2"),
        ("weighted", (3, 5, 2), {"weights": [1, float("nan"), 3]}, "finite and not negative, weight 1 is nan"),
        ("weighted", (3, 5, 2), {"weights": [0, 0, 0]}, "must not all be zero"),
        ("weighted", (3, 5, 2), {"weights": [0, 0, 1], "floor": 0}, "only 1 rows have a probability.*degree 2 needs"),
        ("weighted", (3, 5, 2), {"alpha": -1}, r"alpha must be in \[0, 16\], got -1"),
        ("weighted", (3, 5, 2), {"floor": 1.5}, r"floor must be in \[0, 1\], got 1.5"),
        ("hub", (30, 5, 9), {"alpha": 16}, "only 3 rows have a probability"),
        ("shared", (9, 5, 3), {"supports": 6}, "supports must be an integer from 1 to d_sae = 5, got 6"),
        ("shared", (9, 5, 3), {"supports": True}, "supports must be an integer"),
    ],
)
def test_refusals(kind: str, sizes: tuple[int, int, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, *sizes, **options)


# Controls.


@given(size=small)
def test_clustered_columns_use_whole_blocks(size: Any) -> None:
    m, n, d, seed = size
    rows = build("clustered", m, n, d, seed).rows
    assert (rows[:, 0] % d == 0).all()
    assert (rows - rows[:, :1] == torch.arange(d)).all()
    blocks = [word * (m // d) >> 64 for word in words(seed, 0, n).tolist()]
    assert rows[:, 0].tolist() == [block * d for block in blocks]


@given(size=small, supports=st.integers(1, 20))
def test_shared_reuses_a_balanced_mask(size: Any, supports: int) -> None:
    m, n, d, seed = size
    assume(supports <= n)
    use = Counter(map(tuple, build("shared", m, n, d, seed, supports=supports).rows.tolist()))
    few = Counter(map(tuple, build("balanced", m, supports, d, seed).rows.tolist()))
    assert use.keys() == few.keys()
    for support, times in few.items():
        assert times * (n // supports) <= use[support] <= times * -(-n // supports)


@given(size=small)
def test_banded_columns_are_windows_and_all_starts_occur(size: Any) -> None:
    m, n, d, seed = size
    rows = build("banded", m, n, d, seed).rows
    windows = {tuple(sorted((start + i) % m for i in range(d))): start for start in range(m)}
    starts = Counter(windows[tuple(column)] for column in rows.tolist())
    if d < m:
        assert max(starts.values()) - min(starts[start] for start in range(m)) <= 1


def test_hub_has_skewed_row_degrees() -> None:
    degrees = build("hub", 512, 4096, 7).row_degrees().sort(descending=True).values
    assert degrees[0] > 20 * degrees.median()
    assert degrees[:51].sum() > 0.5 * degrees.sum()  # a tenth of the rows holds most entries
    ranked = build("weighted", 512, 4096, 7, alpha=1.0, floor=0.0).row_degrees().sort(descending=True).values
    assert torch.equal(ranked, degrees)
