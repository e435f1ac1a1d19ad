"""``reproduce collisions``: counts by hand, what random columns touch, the paper's rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expander_sae.experiments import collisions
from expander_sae.mask import Mask
from expander_sae.sae import SAE

M, N, D, K = 20, 30, 3, 4


def an_sae(kind: str = "left-regular") -> SAE:
    return SAE.expander(Mask.build(kind, d_in=M, d_sae=N, degree=D, seed=0), K, relu=True, seed=0).eval()


def activations(count: int = 200) -> torch.Tensor:
    return torch.randn(count, M, generator=torch.Generator().manual_seed(0))


def test_counts_by_hand() -> None:
    sae, h = an_sae(), activations()
    sae.encoder.b_enc.data.fill_(-0.4)  # type: ignore[union-attr] # so that some codes are shorter than k
    code = sae.encode(h)
    lengths = (code.values != 0).sum(dim=1)
    assert lengths.min() < K
    rows = sae.dictionary.mask.rows  # type: ignore[union-attr]
    touched = [
        len({row for j, x in zip(indices, values, strict=True) if x for row in rows[j].tolist()})  # type: ignore[index]
        for indices, values in zip(code.indices.tolist(), code.values.tolist(), strict=True)
    ]
    found = collisions.counted(sae, h, "own encoder", 0)
    assert found["coverage"] == pytest.approx(sum(touched) / len(touched))
    assert found["edges"] == pytest.approx(float(lengths.double().mean()) * D)
    shares = [1 - t / (D * int(n)) for t, n in zip(touched, lengths, strict=True) if n]
    assert found["deficit"] == pytest.approx(sum(shares) / len(shares), rel=1e-5)
    assert collisions.counted(sae, h, "OMP", 0)["edges"] == D * K


def test_random_columns_touch_what_chance_says() -> None:
    sae = SAE.expander(Mask.build("balanced", d_in=512, d_sae=4096, degree=7, seed=0), 64, seed=0).eval()
    h = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
    found = collisions.counted(sae, h, "own encoder", 0)
    expected = 512 * (1 - (1 - 7 / 512) ** 64)  # independent columns of 7 rows
    assert 448 * (1 - found["random"]) == pytest.approx(expected, rel=0.01)


def test_columns_are_drawn_by_their_weights() -> None:
    weights = torch.tensor([1.0, 2.0, 4.0, 0.0])
    drawn = collisions.drawn(weights, 20_000, 1, torch.Generator().manual_seed(0)).flatten()
    shares = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(shares, weights / 7, atol=0.015, rtol=0)
    several = collisions.drawn(torch.ones(6), 500, 4, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 4 for row in several.tolist())
    assert collisions.drawn(weights, 5, 3, torch.Generator().manual_seed(0)).max() == 2, "no fire, no draw"


def test_the_table(tmp_path: Path) -> None:
    finding = collisions.run_collisions(replace(collisions.SMOKE, masks=("left-regular", "clustered")), tmp_path)
    ours = [row for row in finding.rows if not row.get("published")]
    assert [(row["name"], row["reading"]) for row in ours] == [
        (name, reading) for name in ("left-regular", "clustered") for reading in collisions.READINGS
    ]
    assert all(row["coverage"] <= row["edges"] == 9 for row in ours)
    theirs = next(row for row in finding.rows if row.get("published"))
    shown = [column.show(theirs) for column in collisions.COLUMNS]
    assert shown == ["the paper's expander_tied, d=7", "own encoder", "448", "288.7 ± 1.5", "0.356 ± 0.003", "–", "–"]


def test_the_picture() -> None:
    rows = [
        {"name": "hub", "degree": 7, "reading": "OMP", "deficit": 0.4, "random": 0.3, "by_rate": None},
        {"name": "the paper's x", "degree": 7, "reading": "own encoder", "deficit": 0.5},
    ]
    (axes,) = collisions.plot_collisions(rows, "Title").axes
    assert axes.get_yticklabels()[0].get_text() == "hub, d=7, OMP"
    assert [line.get_xydata().tolist() for line in axes.get_lines()] == [[[0.4, 0], [0.5, 1]], [[0.3, 0]]]
