"""Overlap, cycles and coverage of masks against counting by hand."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expander_sae.mask import Mask, Overlap, structure


@st.composite
def masks(draw: st.DrawFn, most: int = 14) -> Mask:
    """Any mask, padded or not."""
    m = draw(st.integers(1, 10))
    d, n = draw(st.integers(1, m)), draw(st.integers(1, most))
    rows = [sorted(draw(st.permutations(range(m)))[:d]) for _ in range(n)]
    held = [draw(st.lists(st.booleans(), min_size=d, max_size=d).filter(any)) for _ in range(n)]
    return Mask.from_rows(torch.tensor(rows), m, torch.tensor(held) if draw(st.booleans()) else None)


def supports(mask: Mask) -> list[set[int]]:
    return [set(column.nonzero().flatten().tolist()) for column in mask.to_dense().T]


@given(mask=masks())
def test_overlap_counts_all_pairs(mask: Mask) -> None:
    shared = Counter(len(a & b) for a, b in itertools.combinations(supports(mask), 2))
    overlap = mask.overlap()
    assert {a: count for a, count in enumerate(overlap.counts) if count} == shared
    assert overlap.maximum == max(shared, default=0)
    pairs = sum(shared.values())
    assert overlap.mean == (sum(a * count for a, count in shared.items()) / pairs if pairs else 0)


@given(mask=masks())
def test_four_cycles_are_pairs_of_rows_in_pairs_of_columns(mask: Mask) -> None:
    found = 0
    for a, b in itertools.combinations(supports(mask), 2):
        found += sum(1 for _ in itertools.combinations(a & b, 2))
    assert mask.four_cycles() == found


def shortest_cycle(mask: Mask) -> int | None:
    """For every edge: the shortest way round it."""
    columns = supports(mask)
    edges = {(f"c{j}", f"r{row}") for j, column in enumerate(columns) for row in column}
    near: dict[str, set[str]] = {}
    for a, b in edges:
        near.setdefault(a, set()).add(b)
        near.setdefault(b, set()).add(a)
    lengths = []
    for a, b in edges:
        seen, front, length = {a}, {a}, 0
        while front and b not in front:
            front = {there for here in front for there in near[here] if {here, there} != {a, b}} - seen
            seen |= front
            length += 1
        if front:
            lengths.append(length + 1)
    return min(lengths, default=None)


@given(mask=masks(most=8))
def test_girth(mask: Mask) -> None:
    assert mask.girth() == shortest_cycle(mask)


def ring(columns: int) -> Mask:
    """One cycle through all columns and rows."""
    rows = [sorted([j, (j + 1) % columns]) for j in range(columns)]
    return Mask.from_rows(torch.tensor(rows), columns)


@pytest.mark.parametrize("columns", [2, 3, 4, 5, 8, 31])
def test_girth_of_a_ring(columns: int) -> None:
    assert ring(columns).girth() == 2 * columns if columns > 2 else 4
    assert Mask.from_rows(ring(columns).rows[:-1], columns).girth() is None


def test_girth_of_known_graphs() -> None:
    fano = [[0, 1, 2], [0, 3, 4], [0, 5, 6], [1, 3, 5], [1, 4, 6], [2, 3, 6], [2, 4, 5]]
    assert Mask.from_rows(torch.tensor(fano), 7).girth() == 6
    assert Mask.from_rows(torch.tensor(fano), 7).overlap() == Overlap((0, 21))
    edges = torch.tensor(list(itertools.combinations(range(4), 2)))
    assert Mask.from_rows(edges, 4).girth() == 6  # a triangle of K4, subdivided
    # The generalised quadrangle of order (2, 2): points are pairs from six, lines the ways to split six into pairs.
    pairs = list(itertools.combinations(range(6), 2))
    quadrangle = [
        sorted(pairs.index(pair) for pair in three)
        for three in itertools.combinations(pairs, 3)
        if len(set(itertools.chain(*three))) == 6
    ]
    assert Mask.from_rows(torch.tensor(quadrangle), 15).girth() == 8  # Tutte's eight-cage


def test_girth_of_masks() -> None:
    assert Mask.build("left-regular", d_in=512, d_sae=4096, degree=7).girth() == 4
    assert Mask.build("gf2", d_in=512, d_sae=4096, degree=8).girth() == 6
    assert Mask.build("clustered", d_in=64, d_sae=99, degree=1).girth() is None


@given(mask=masks(), data=st.data())
def test_coverage_counts_distinct_rows(mask: Mask, data: st.DataObject) -> None:
    column = st.integers(-1, mask.d_sae - 1)
    indices = data.draw(st.lists(st.lists(column, min_size=3, max_size=3), min_size=1, max_size=5))
    columns = supports(mask)
    expected = [len(set().union(*(columns[j] for j in sample if j >= 0))) for sample in indices]
    assert mask.coverage(torch.tensor(indices)).tolist() == expected


def test_coverage_in_parts_and_its_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Mask.build("bernoulli", d_in=50, d_sae=99, degree=5)
    indices = torch.randint(-1, 99, (40, 6), dtype=torch.int32)
    whole = mask.coverage(indices)
    monkeypatch.setattr(structure, "_COVERAGE_CELLS", 200)
    assert torch.equal(mask.coverage(indices), whole)
    assert mask.coverage(torch.zeros(0, 6, dtype=torch.int64)).shape == (0,)
    assert mask.coverage(torch.zeros(3, 0, dtype=torch.int64)).tolist() == [0, 0, 0]
    for bad in (torch.zeros(3, dtype=torch.int64), torch.full((1, 2), 99)):
        with pytest.raises(ValueError, match="columns below 99"):
            mask.coverage(bad)


def test_blocks_do_not_change_the_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Mask.build("bernoulli", d_in=50, d_sae=99, degree=5)
    whole, girth = mask.overlap(), mask.girth()
    monkeypatch.setattr(structure, "_BLOCK_PRODUCTS", 100)
    assert mask.overlap() == whole
    assert mask.girth() == girth


def test_padding_counts_nowhere_and_is_part_of_the_hash() -> None:
    rows, held = torch.tensor([[0, 2, 3], [1, 2, 4]]), torch.tensor([[True, False, True], [True, True, True]])
    mask = Mask.from_rows(rows, 5, held)
    assert mask.counts.tolist() == [2, 3]
    assert mask.num_entries == 5
    assert mask.row_degrees().tolist() == [1, 1, 1, 1, 1]
    assert mask.overlap() == Overlap((1,))
    assert mask.sha256 != Mask.from_rows(rows, 5).sha256
    assert mask.sha256 != Mask.from_rows(rows, 5, ~held | (rows == 2)).sha256
    assert Mask.from_rows(rows, 5, torch.ones_like(held)).sha256 == Mask.from_rows(rows, 5).sha256
    assert "degree<=3" in repr(mask)
    with pytest.raises(ValueError, match="column 1 holds no entry"):
        Mask.from_rows(rows, 5, torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ValueError, match="held must be bool of the rows' shape"):
        Mask.from_rows(rows, 5, held[:, :2])
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        Mask.from_rows(rows, 5, held.long())
