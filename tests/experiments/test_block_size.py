"""``reproduce block-size``: the problem, the shape of the table, the speed-ups, resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.picture import points

from expander_sae.experiments import block_size

SIZE = block_size.BlockSize(m=64, n=256, d=5, k=8, batch=40, blocks=(1, 2, 8), repeats=1, devices=("cpu",))


def test_the_planted_problem() -> None:
    matrix, data = block_size.problem(SIZE)
    assert (matrix.d_in, matrix.d_sae, matrix.rows.shape[1]) == (64, 256, 5)
    torch.testing.assert_close(matrix.norms(), torch.ones(256))
    assert {h.shape for h in data.values()} == {(40, 64)}
    again = block_size.problem(SIZE)[1]
    assert all(torch.equal(h, again[kind]) for kind, h in data.items())


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = block_size.run_block_size(SIZE, tmp_path).rows
    assert len(rows) == 2 * (3 + 2)  # one column a round is disjoint of itself
    assert {row["where"] for row in rows} == {"cpu float32"}
    found = {(row["data"], row["rule"], row["block"]): row for row in rows}
    for kind in block_size.DATA:
        errors = [found[kind, "plain", block]["relative_error"] for block in SIZE.blocks]
        assert errors == sorted(errors)  # larger blocks, larger errors
        assert found[kind, "disjoint", 2]["relative_error"] <= found[kind, "plain", 2]["relative_error"] + 0.01
        one, shot = found[kind, "plain", 1], found[kind, "plain", 8]
        assert one["over_iterative"] == shot["over_one_shot"] == 1
        assert shot["over_iterative"] == pytest.approx(one["milliseconds"] / shot["milliseconds"])
    assert [found["planted", "plain", block]["rounds"] for block in SIZE.blocks] == [8, 4, 1]
    # Noise of 30 % cannot be coded, planted columns can.
    assert 0.15 < found["planted", "plain", 1]["relative_error"] < 0.35
    monkeypatch.setattr(block_size, "measure", lambda *args: pytest.fail("measured again"))
    assert block_size.run_block_size(SIZE, tmp_path).rows == rows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_in_bfloat16(tmp_path: Path) -> None:
    rows = block_size.run_block_size(replace(SIZE, devices=()), tmp_path).rows
    errors = {
        where: [row["relative_error"] for row in rows if row["where"] == where]
        for where in ("cpu float32", "cuda bfloat16")
    }
    assert errors["cuda bfloat16"] == pytest.approx(errors["cpu float32"], rel=0.05)


def test_the_picture() -> None:
    rows = [
        {"where": "cpu", "data": data, "rule": rule, "block": block}
        | {"microseconds": 8.0 / block, "relative_error": 0.1 * block}
        for data in ("planted", "gaussian")
        for rule, block in (("plain", 1), ("plain", 4), ("disjoint", 4))
    ]
    figure = block_size.plot_block_size(rows, "Title")
    assert [axes.get_ylabel() for axes in figure.axes] == ["relative error", "microseconds per sample"] * 2
    assert [axes.get_title() for axes in figure.axes] == ["planted data"] * 2 + ["gaussian data"] * 2
    for errors, times in zip(figure.axes[::2], figure.axes[1::2], strict=True):
        assert points(errors) == {"cpu, plain": [[1, 0.1], [4, 0.4]], "cpu, disjoint": [[4, 0.4]]}
        assert points(times) == {"cpu, plain": [[1, 8], [4, 2]], "cpu, disjoint": [[4, 2]]}
