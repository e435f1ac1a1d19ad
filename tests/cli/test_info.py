"""``expander-sae info`` of whatever training leaves: runs, checkpoints, folders of several."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from support.training import MODERN, PAPER, activations, expander, interrupted
from typer.testing import CliRunner

from expander_sae.cli import app
from expander_sae.data.sources import TensorSource
from expander_sae.mask import Mask
from expander_sae.sae import SAE
from expander_sae.training import train


def info(place: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["info", str(place), *options], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, an unfinished one, and a folder that is neither."""
    folder = tmp_path_factory.mktemp("runs")
    done = expander(relu=True)
    train(done, TensorSource(activations()), MODERN, folder / "done")
    done.metadata["metrics"] = {"fvu": 0.4567}
    done.save_pretrained(folder / "done")
    with pytest.raises(KeyboardInterrupt):
        train(expander().with_encoder("omp"), interrupted(25), PAPER, folder / "cut")
    (folder / "pictures").mkdir()
    return folder


def facts(shown: Result) -> dict[str, str]:
    assert shown.exit_code == 0, shown.output
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in shown.output.splitlines())  # type: ignore[misc]


def test_signed_codes(runs: Path) -> None:
    assert facts(info(runs / "done"))["signed codes"] == "no"
    assert facts(info(runs / "cut"))["signed codes"] == "yes"


@pytest.mark.parametrize("inside", ["", "checkpoint.safetensors"])
def test_an_unfinished_run_and_its_checkpoint(runs: Path, inside: str) -> None:
    shown = facts(info(runs / "cut" / inside))
    assert shown["SAE"] == "expander, omp encoder"
    assert re.search(r"checkpoint\.safetensors, 2\d of 30 steps done: `train --from` it", shown["checkpoint"])
    assert shown["hashes"] == "checkpoint and mask match their SHA-256"


def test_the_checkpoint_of_a_finished_run(runs: Path) -> None:
    assert "30 of 30 steps done" in facts(info(runs / "done" / "checkpoint.safetensors"))["checkpoint"]


def test_several(runs: Path) -> None:
    shown = info(runs)
    assert shown.exit_code == 0, shown.output
    rows = {line.split()[0].strip("│ "): line for line in shown.output.splitlines() if re.search("done|cut", line)}
    assert all(fact in rows["done"] for fact in ("expander d=4, tied", "12 x 24, k=3", "no", "96", "finished", "0.457"))
    assert all(fact in rows["cut"] for fact in ("expander d=4, omp", "yes", "of 30 steps done"))
    assert "pictures" not in shown.output
    assert "2 SAEs in" in shown.output


def damaged(path: Path) -> Any:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["done/sae.safetensors", "cut/checkpoint.safetensors"])
def test_one_of_several_is_damaged(runs: Path, name: str) -> None:
    whole = (runs / name).read_bytes()
    damaged(runs / name)
    try:
        for place in (runs, (runs / name).parent):
            shown = info(place)
            assert shown.exit_code == 1
            assert name.split("/")[1] in shown.stderr
            assert "Traceback" not in shown.output
    finally:
        (runs / name).write_bytes(whole)


def test_the_mask_is_drawn(runs: Path, tmp_path: Path) -> None:
    shown = info(runs / "done", "--plot", str(tmp_path / "mask.png"))
    assert shown.exit_code == 0, shown.output
    assert f"The mask is drawn in {tmp_path / 'mask.png'}" in shown.output
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_a_dense_sae_has_no_mask_to_draw(tmp_path: Path) -> None:
    SAE.dense(4, 6, k=2).save_pretrained(tmp_path)
    shown = info(tmp_path, "--plot", str(tmp_path / "mask.png"))
    assert shown.exit_code != 0
    assert "has no mask to draw" in shown.output
    assert not (tmp_path / "mask.png").exists()


def test_the_weights_of_a_mask_are_not_printed_one_by_one(tmp_path: Path) -> None:
    mask = Mask.build("weighted", d_in=40, d_sae=50, degree=3, weights=list(range(40)))
    SAE.expander(mask, 2).save_pretrained(tmp_path)
    assert '"weights": "40 numbers"' in facts(info(tmp_path))["mask"]
