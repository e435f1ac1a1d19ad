"""The picture of a mask shows what the mask counts."""

from __future__ import annotations

import pytest
from support.picture import points

from expander_sae.mask import Mask
from expander_sae.report.mask import plot_mask


@pytest.mark.parametrize("kind", ["left-regular", "bernoulli", "clustered"])
def test_four_panels(kind: str) -> None:
    mask = Mask.build(kind, d_in=30, d_sae=400, degree=3)
    pattern, degrees, histogram, graph = plot_mask(mask, "a title").axes
    columns, rows = pattern.get_lines()[0].get_data()
    assert len(set(columns)) == 256
    assert all(mask.to_dense()[int(row), int(column)] for row, column in zip(rows, columns, strict=True))
    assert degrees.get_lines()[0].get_ydata().tolist() == mask.row_degrees().tolist()
    assert points(degrees)["mean"][0][1] == mask.num_entries / 30
    assert [bar.get_height() for bar in histogram.patches] == list(mask.overlap().counts)
    links = len(graph.get_lines()) - 1
    assert f"{links} of 1128 pairs" in graph.get_title()
    dense = mask.to_dense().float()[:, [i * 400 // 48 for i in range(48)]]
    assert links == int((dense.T @ dense).triu(1).count_nonzero())


def test_few_columns() -> None:
    assert len(plot_mask(Mask.build("gf2", d_in=4, d_sae=1, degree=2), "one column").axes) == 4
