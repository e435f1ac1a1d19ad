"""Checkpoints: the state comes back bit for bit, only to the run it belongs to, and a failed save costs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from expander_sae.training import checkpoint as checkpoint_module
from expander_sae.training.checkpoint import Checkpoint

IDENTITY: dict[str, Any] = {"sae": {"d_in": 8, "mask": {"seed": 2}}, "train": {"lr": 1e-3, "steps": 5}, "rows": 100}


def state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {
        "weights": torch.randn(4, 3, dtype=torch.float64),
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor([2**40, 3]),
        "step": torch.tensor(7.0),
        "strided": torch.randn(3, 4).T,
        "empty": torch.zeros(0, 2),
    }
    return tensors, {"step": 7, "loss": 0.1 + 0.2, "first": None}


def test_round_trip(tmp_path: Path) -> None:
    saved = state()
    Checkpoint(tmp_path / "new" / "state", IDENTITY).save(saved)
    loaded = Checkpoint(tmp_path / "new" / "state", IDENTITY).load()
    assert loaded is not None
    assert loaded[1] == saved[1]
    assert loaded[0].keys() == saved[0].keys()
    for name, tensor in saved[0].items():
        assert loaded[0][name].dtype == tensor.dtype
        assert torch.equal(loaded[0][name], tensor)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["state"]


def test_nothing_saved(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path / "state", IDENTITY).load() is None


def changed(path: list[str], value: Any) -> dict[str, Any]:
    identity = json.loads(json.dumps(IDENTITY))
    inner = identity
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return identity


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (changed(["train", "lr"], 2e-3), r"belongs to another run: train\.lr was 0\.001 and is 0\.002\. Use the same"),
        (changed(["sae", "mask", "seed"], 3), r"sae\.mask\.seed was 2 and is 3"),
        (changed(["sae", "mask"], None), r"sae\.mask was \{'seed': 2\} and is None"),
        (changed(["rows"], 99), "rows was 100 and is 99"),
        (changed(["train", "new"], 1), r"train\.new was None and is 1"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    Checkpoint(tmp_path / "state", IDENTITY).save(state())
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path / "state", other).load()


def test_every_difference_is_named(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "state", IDENTITY).save(state())
    with pytest.raises(ValueError, match=r"rows was 100 and is 5; train\.lr was 0\.001 and is 3"):
        Checkpoint(tmp_path / "state", changed(["train", "lr"], 3) | {"rows": 5}).load()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(identity=st.dictionaries(st.text(max_size=3), values, max_size=4))
def test_an_identity_agrees_with_itself(identity: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("run") / "state"
    Checkpoint(path, identity).save(({}, {}))
    assert Checkpoint(path, identity).load() == ({}, {})


def test_an_identity_that_is_no_json_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="JSON"):
        Checkpoint(tmp_path / "state", {"path": tmp_path})


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_checkpoint(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "state"
    Checkpoint(path, IDENTITY).save(state())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"state cannot be read .*; delete it to start afresh"):
        Checkpoint(path, IDENTITY).load()


@pytest.mark.parametrize("where", ["a weight", "a number"])
def test_an_altered_checkpoint(where: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    Checkpoint(path, IDENTITY).save(state())
    content = bytearray(path.read_bytes())
    place = len(content) - 1 if where == "a weight" else content.index(b'step\\": 7') + len(b'step\\": ')
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="its content is not what was written"):
        Checkpoint(path, IDENTITY).load()


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(2)}, tmp_path / "state")
    with pytest.raises(ValueError, match="cannot be read"):
        Checkpoint(tmp_path / "state", IDENTITY).load()


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_keeps_the_last_one(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path / "state", IDENTITY)
    checkpoint.save(state())
    before = checkpoint.path.read_bytes()

    def half(_tensors: Any, path: Path, _metadata: Any) -> None:
        Path(path).write_bytes(before[:50])
        raise error

    monkeypatch.setattr(checkpoint_module, "save_file", half)
    expected = OSError if isinstance(error, SafetensorError) else KeyboardInterrupt
    with pytest.raises(expected):
        checkpoint.save(({"weights": torch.zeros(3)}, {}))
    assert checkpoint.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
