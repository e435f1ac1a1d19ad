"""Masks: the bit stream is a file format, so it is frozen; supports are uniform; bad rows are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expander_sae.mask import CONSTRUCTIONS, Mask, MaskRecipe, constructions, sampled, sort_entries

# Frozen when the format was made. A change here makes every stored SAE unreadable: add a new kind instead.
GOLDEN = {
    ("left-regular", 576, 4608, 7, 0): "06b09bff715fb05617a3bf46738a666e4a6f89bb31659846864ff28ca33b3728",
    ("left-regular", 512, 4096, 30, 17): "daa92e8da41eae093f961a5f38d07d30d0b18cc81eeb188abd75b4c52cfa2a61",
    ("left-regular", 5, 9, 5, 3): "b9500d828997b886eb7e3a32610cec62fd45055cf4372c9f996e2d98d58a67e6",
    ("left-regular", 64, 100, 1, 2**64 - 1): "450e883f1ceadf53c4fa97434a33d6bc94ec73428a9773b860947ea2a1e1fd94",
    ("balanced", 576, 4608, 7, 0): "78d55278fe4e3d281c04ed27b5ccf8756e4bfa917a744de59004107b84a2162b",
    ("balanced", 512, 4096, 30, 17): "0ad338219270c64783c2e430e73f6675428d2cef90f7744a991bd453319a2810",
    ("balanced", 7, 9, 5, 3): "75af21cd300fca5128f47a876a237780bc7b69c283361f1aea24db922e3f1237",
    ("balanced", 64, 100, 1, 2**64 - 1): "29980d01f5462e7b8e450081f4d3c199b2679a2848e428290e5e52940155f81b",
}

sizes = st.tuples(st.integers(1, 40), st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**64 - 1)).filter(
    lambda size: size[2] <= size[0]
)


# Those of other shapes or with sizes that do not fit: test_constructions.py.
ANY_SIZE = [kind for kind in CONSTRUCTIONS if kind not in ("reed-solomon", "gf2", "bernoulli")]


def build(kind: str, size: tuple[int, int, int, int]) -> Mask:
    d_in, d_sae, degree, seed = size
    return Mask.build(kind, d_in=d_in, d_sae=d_sae, degree=degree, seed=seed)


# An independent statement of the format in plain integers: Philox4x64-10 as published (Salmon et al. 2011, with the
# constants of the authors' Random123), and the two draws word by word.


def philox_words(seed: int, stream: int) -> Iterator[int]:
    whole = 2**64 - 1
    for block in itertools.count(1):  # numpy counts up before it draws
        counter, key = [block, 0, 0, 0], [seed, stream]
        for _ in range(10):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * counter[0], 2**64)
            high1, low1 = divmod(0xCA5A826395121157 * counter[2], 2**64)
            counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
            key = [(key[0] + 0x9E3779B97F4A7C15) & whole, (key[1] + 0xBB67AE8584CAA73B) & whole]
        yield from counter


def plain_left_regular(m: int, n: int, d: int, seed: int) -> list[list[int]]:
    words = philox_words(seed, 0)
    columns = []
    for _ in range(n):
        chosen: set[int] = set()
        for last in range(m - d, m):
            draw = next(words) * (last + 1) >> 64
            chosen.add(last if draw in chosen else draw)
        columns.append(sorted(chosen))
    return columns


def plain_balanced(m: int, n: int, d: int, seed: int) -> list[list[int]]:
    columns: list[list[int]] = [[]]
    for deck in itertools.count(1):
        words = list(itertools.islice(philox_words(seed, deck), m))
        cards = sorted(range(m), key=lambda row: words[row])
        needed = (d - len(columns[-1])) % d  # by a column begun in the deck before
        first = [card for card in cards if card not in columns[-1]][:needed] if needed else []
        for card in first + [card for card in cards if card not in first]:
            if len(columns[-1]) == d:
                if len(columns) == n:
                    return [sorted(column) for column in columns]
                columns.append([])
            columns[-1].append(card)
        if len(columns) == n and len(columns[-1]) == d:
            return [sorted(column) for column in columns]
    raise AssertionError


@pytest.mark.parametrize(("recipe", "sha256"), GOLDEN.items(), ids=str)
def test_golden_hashes(recipe: tuple[str, int, int, int, int], sha256: str) -> None:
    assert build(recipe[0], recipe[1:]).sha256 == sha256


@pytest.mark.parametrize(("kind", "plain"), [("left-regular", plain_left_regular), ("balanced", plain_balanced)])
@given(size=sizes.filter(lambda size: size[0] * size[1] * size[2] < 2000))
def test_draw_is_the_published_bit_stream(kind: str, plain, size: tuple[int, int, int, int]) -> None:
    assert build(kind, size).rows.tolist() == plain(*size)


@pytest.mark.parametrize("kind", ANY_SIZE)
@given(size=sizes)
def test_columns_have_distinct_ascending_rows_and_rows_their_degrees(
    kind: str, size: tuple[int, int, int, int]
) -> None:
    d_in, d_sae, degree, _ = size
    mask = build(kind, size)
    assert mask.rows.dtype == torch.int32
    assert mask.rows.is_contiguous()
    assert mask.rows.shape == (d_sae, degree) == (mask.d_sae, mask.degree)
    assert mask.rows.min() >= 0
    assert mask.rows.max() < d_in
    assert (mask.rows.diff(dim=1) > 0).all()
    degrees = mask.row_degrees()
    assert degrees.shape == (d_in,)
    assert degrees.sum() == d_sae * degree
    if kind == "balanced":
        assert degrees.max() - degrees.min() <= 1
    if degree == d_in:
        assert (degrees == d_sae).all()


def chi_square(counts: list[int], expected: float) -> float:
    return sum((count - expected) ** 2 / expected for count in counts)


@pytest.mark.parametrize("kind", ["left-regular", "balanced"])
def test_every_support_is_equally_likely(kind: str) -> None:
    n = 30_000
    # m = 7 is no multiple of d = 3: two columns in seven of a balanced mask straddle two decks.
    rows = Mask.build(kind, d_in=7, d_sae=n, degree=3, seed=5).rows.tolist()
    seen = dict.fromkeys(itertools.combinations(range(7), 3), 0)
    for support in rows:
        seen[tuple(support)] += 1
    assert chi_square(list(seen.values()), n / 35) < 65.2  # the .999 quantile for 34 degrees of freedom


def test_columns_of_a_left_regular_mask_are_independent() -> None:
    n = 40_000
    rows = Mask.build("left-regular", d_in=5, d_sae=n, degree=2, seed=5).rows.tolist()
    supports = list(itertools.combinations(range(5), 2))
    seen = dict.fromkeys(itertools.product(supports, supports), 0)
    for left, right in zip(rows[::2], rows[1::2], strict=True):
        seen[tuple(left), tuple(right)] += 1
    assert chi_square(list(seen.values()), n / 2 / 100) < 148.2  # .999, 99 degrees of freedom


@pytest.mark.parametrize("kind", CONSTRUCTIONS)
def test_seed_decides(kind: str) -> None:
    masks = [Mask.build(kind, d_in=80, d_sae=20, degree=5, seed=seed) for seed in (0, 0, 1, 2**63, 2**64 - 1)]
    assert masks[0].sha256 == masks[1].sha256
    assert len({mask.sha256 for mask in masks}) == 4


def test_working_memory_does_not_change_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Mask.build("left-regular", d_in=31, d_sae=57, degree=4, seed=9)
    monkeypatch.setattr(sampled, "_CHUNK_CELLS", 100)  # three columns at a time
    assert Mask.build("left-regular", d_in=31, d_sae=57, degree=4, seed=9).sha256 == whole.sha256


def test_hash_is_the_documented_one() -> None:
    mask = Mask.from_rows(torch.tensor([[0, 2], [1, 4]]), d_in=5)
    text = b"expander-sae mask v1\0" + struct.pack("<3q4i", 5, 2, 2, 0, 2, 1, 4)
    assert mask.sha256 == hashlib.sha256(text).hexdigest()
    assert mask.sha256 != Mask.from_rows(mask.rows, d_in=6).sha256
    assert mask.sha256 != Mask.from_rows(torch.tensor([[0, 2], [1, 3]]), d_in=5).sha256


def test_hash_is_of_the_rows_not_of_their_origin() -> None:
    drawn = Mask.build("balanced", d_in=12, d_sae=9, degree=4)
    given_ = Mask.from_rows(drawn.rows, d_in=12)
    assert given_.recipe is None
    assert given_.sha256 == drawn.sha256


def test_recipe_redraws_the_mask_and_is_json() -> None:
    whole = [np.int64(number) for number in (20, 30, 4, 7)]
    mask = build("balanced", whole)  # type: ignore[arg-type]
    assert mask.recipe == MaskRecipe("balanced", 20, 30, 4, 7)
    again = Mask.from_recipe(MaskRecipe(**json.loads(json.dumps(mask.recipe.to_dict()))))
    assert again.sha256 == mask.sha256


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32, np.int64])
def test_from_rows_takes_any_integers_in_order(dtype: type) -> None:
    mask = Mask.from_rows(np.array([[0, 2, 4], [0, 1, 3]], dtype=dtype), d_in=5)
    assert mask.rows.dtype == torch.int32
    assert mask.rows.tolist() == [[0, 2, 4], [0, 1, 3]]


def test_rows_out_of_order_are_refused_because_values_may_stand_beside_them() -> None:
    rows = torch.tensor([[4, 0, 2], [1, 3, 0]])
    with pytest.raises(ValueError, match=r"column 0 are not distinct and ascending.*sort_entries"):
        Mask.from_rows(rows, d_in=5)
    values = torch.tensor([[0.4, 0.0, 0.2], [0.1, 0.3, 0.0]])
    sorted_rows, sorted_values = sort_entries(rows, values)
    assert sorted_rows.tolist() == [[0, 2, 4], [0, 1, 3]]
    assert torch.equal(sorted_values, sorted_rows / 10)
    assert torch.equal(sort_entries(rows), sorted_rows)
    assert Mask.from_rows(sorted_rows, d_in=5).rows.dtype == torch.int32
    with pytest.raises(ValueError, match="must have one shape"):
        sort_entries(rows, values[:1])


def test_options_and_versions_of_a_kind() -> None:
    with pytest.raises(ValueError, match=r"unknown mask kind 'balnced'; did you mean 'balanced'"):
        Mask.build("balnced", d_in=4, d_sae=2, degree=2)
    with pytest.raises(ValueError, match=r"mask kind 'balanced' has no option 'alpha'; it takes none"):
        Mask.build("balanced", d_in=4, d_sae=2, degree=2, alpha=0.5)
    with pytest.raises(ValueError, match="has version 1 here, the recipe names version 2"):
        Mask.build("balanced", d_in=4, d_sae=2, degree=2, version=2)


def test_a_new_kind_is_a_function_and_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(m: int, n: int, d: int, seed: int, step: int = 1) -> np.ndarray:
        return np.sort((np.arange(n)[:, None] * step + np.arange(d)) % m, axis=1).astype(np.int32)

    monkeypatch.setitem(CONSTRUCTIONS, "shifted", constructions.Construction(shifted, version=3))
    mask = Mask.build("shifted", d_in=7, d_sae=4, degree=2, step=2)
    assert mask.rows.tolist() == [[0, 1], [2, 3], [4, 5], [0, 6]]
    assert mask.recipe == MaskRecipe("shifted", 7, 4, 2, 0, {"step": 2}, 3)
    assert Mask.from_recipe(mask.recipe).sha256 == mask.sha256


def test_to_dense_and_repr() -> None:
    mask = Mask.from_rows([[0, 2], [1, 2]], d_in=4)  # type: ignore[arg-type]
    assert mask.to_dense().tolist() == [[True, False], [False, True], [True, True], [False, False]]
    assert repr(mask) == "Mask(d_in=4, d_sae=2, degree=2, given rows)"
    assert "balanced, seed 3" in repr(Mask.build("balanced", d_in=4, d_sae=2, degree=2, seed=3))


def test_a_mask_cannot_be_changed() -> None:
    mask = Mask.build("balanced", d_in=4, d_sae=2, degree=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.d_in = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"degree": 11}, "degree 11 exceeds d_in 10"),
        ({"degree": 0}, "degree must be at least 1, got 0"),
        ({"degree": -2}, "degree must be at least 1, got -2"),
        ({"d_in": 0}, "d_in must be at least 1, got 0"),
        ({"d_sae": 0}, "d_sae must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64}, r"seed must be in \[0, 2\*\*64\)"),
        ({"kind": "expanding"}, "unknown mask kind 'expanding'; choose one of 'left-regular', 'balanced'"),
    ],
)
def test_bad_sizes(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mask.build(**({"kind": "left-regular", "d_in": 10, "d_sae": 5, "degree": 3} | change))


@pytest.mark.parametrize("name", ["d_in", "d_sae", "degree", "seed"])
def test_sizes_must_be_integers(name: str) -> None:
    with pytest.raises(TypeError, match="integer"):
        Mask.build(**({"kind": "balanced", "d_in": 10, "d_sae": 5, "degree": 3, "seed": 0} | {name: 2.0}))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1], [2, 2]], "column 1 are not distinct and ascending: .2, 2.; .*duplicates must be removed"),
        ([[0, 5]], r"rows must lie in \[0, 5\), got \[0, 5\]"),
        ([[-1, 2]], r"rows must lie in \[0, 5\), got \[-1, 2\]"),
        ([0, 1, 2], "shape"),
        ([[[0, 1]]], "shape"),
        ([[]], "shape"),
    ],
)
def test_bad_rows(rows: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mask.from_rows(torch.tensor(rows, dtype=torch.int64), d_in=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_rows_must_be_integers(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="rows must be integers"):
        Mask.from_rows(torch.zeros(2, 1).to(dtype), d_in=5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([[0, 1]]), "int32 of shape .d_sae, degree., got torch.int64"),
        (torch.tensor([[1, 0]], dtype=torch.int32), "not distinct and ascending"),
        (torch.zeros(0, 3, dtype=torch.int32), "at least one column"),
    ],
)
def test_the_constructor_checks_too(rows: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mask(rows, 5)
