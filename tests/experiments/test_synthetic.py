"""``reproduce synthetic``: planted codes found again, certified levels, the comparison with the paper's figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expander_sae.experiments import synthetic
from expander_sae.experiments.common.planted import random_matrix
from expander_sae.mask import Mask

# Of the paper's size, and cheap: few features on columns of few rows.
AS_THE_PAPER = synthetic.SyntheticSettings(
    degrees=(7,), masks=("reed-solomon",), mask_degrees=(7, 30), ks=(4, 16), noises=(0.0, 0.05), trials=100, seeds=(0,)
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return synthetic.run_synthetic(AS_THE_PAPER, tmp_path_factory.mktemp("synthetic"))


def row_of(finding: Any, mask: str, degree: int, noise: float) -> dict[str, Any]:
    return next(row for row in finding.rows if (row["mask"], row["degree"], row["noise"]) == (mask, degree, noise))


def test_the_papers_figures_are_reproduced(found: Any) -> None:
    for noise in (0.0, 0.05):
        assert row_of(found, "left-regular", 7, noise)["agreement"] == "2 of 2"
    assert row_of(found, "reed-solomon", 7, 0.0)["agreement"] is None
    # 4 of the paper's own: at d = 7 and 30, at 4 and 16 features, with and without noise.
    assert any("8 of 8 agree; 0 do not" in note for note in found.notes)


def test_a_difference_from_the_paper_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(synthetic.published.SYNTHETIC, (7, 0.05), ((286, 300), (252, 300), (90, 300)))
    small = replace(AS_THE_PAPER, masks=(), mask_degrees=(), ks=(16,), noises=(0.05,))
    finding = synthetic.run_synthetic(small, tmp_path)
    (point,) = finding.rows[0]["points"]
    assert (point["agrees"], finding.rows[0]["agreement"]) == ("no", "0 of 1")
    assert any("1 do not (d=7 noise=0.05 k=16)" in note for note in finding.notes)


def test_certified_codes_are_always_found(found: Any) -> None:
    levels = {mask: row_of(found, mask, 7, 0.0)["certified"] for mask in ("left-regular", "reed-solomon")}
    assert levels == {"left-regular": 1, "reed-solomon": 3}, "overlap 1 on 7 rows: (2k - 1) < 7"
    matrix = random_matrix(
        Mask.build("reed-solomon", d_in=512, d_sae=4096, degree=7), "flat", torch.Generator().manual_seed(0)
    )
    assert synthetic.solve(matrix, 3, 0.0, 200, seed=5)["found"] == 200


def test_masks_that_do_not_exist_are_named(found: Any) -> None:
    row = row_of(found, "reed-solomon", 30, 0.0)
    assert (row["points"], row["found"], row["certified"]) == ([], None, None)
    assert any(note.startswith("Not to be had: reed-solomon at d = 30:") for note in found.notes)
    with pytest.raises(ValueError, match="unknown mask kind 'banned'"):
        replace(AS_THE_PAPER, masks=("banned",))


def test_noise_makes_it_harder(found: Any) -> None:
    for mask in ("left-regular", "reed-solomon"):
        rates = {noise: row_of(found, mask, 7, noise)["points"][1]["rate"] for noise in (0.0, 0.05)}
        assert rates[0.05] < 0.9 < rates[0.0]


def test_supports_are_compared_in_any_order() -> None:
    first = torch.tensor([[1, 2, 3], [1, 2, 3], [4, 5, 6]])
    second = torch.tensor([[3, 1, 2], [1, 2, 4], [6, 5, 4]])
    assert synthetic.same_features(first, second).tolist() == [True, False, True]


def test_the_largest_k_needs_all_below_it() -> None:
    points = [{"k": k, "rate": rate} for k, rate in ((4, 1.0), (8, 0.96), (16, 0.7), (32, 0.99))]
    assert [synthetic.largest_found(points, share) for share in (0.95, 0.5)] == [8, 32]
    assert synthetic.largest_found([{"k": 4, "rate": 0.2}], 0.5) == 0
