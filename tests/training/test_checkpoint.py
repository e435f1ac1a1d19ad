"""Checkpoints: the state comes back bit for bit, only to the run it belongs to, and a failed save costs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
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
    with pytest.raises(ValueError, match=r"state cannot be read .*no checkpoint of a training run"):
        Checkpoint(tmp_path / "state", IDENTITY).load()


def test_peek_needs_no_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, numbers = state()
    Checkpoint(tmp_path / "state", IDENTITY).save((tensors, numbers))
    monkeypatch.setenv("HOME", str(tmp_path))
    saved = Checkpoint.peek("~/state")
    assert (saved.identity, saved.numbers) == (IDENTITY, numbers)
    assert all(torch.equal(saved.tensors[name], tensors[name]) for name in tensors)
    before = (tmp_path / "state").read_bytes()
    saved.tensors["weights"].zero_()  # its own copy
    assert (tmp_path / "state").read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*nowhere"):
        Checkpoint.peek(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{tmp_path.name} cannot be read"):
        Checkpoint.peek(tmp_path)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "state"
    Checkpoint(path, IDENTITY).save(state())
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        if place < header and json_of(damaged) == json_of(content):
            continue  # white space that pads the header
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state cannot be read .*; delete it to start afresh"):
            Checkpoint(path, IDENTITY).load()


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "state", IDENTITY).save(state())
    with open(tmp_path / "state", "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=r"state cannot be read \(it has \d+ bytes, its header says"):
        Checkpoint(tmp_path / "state", IDENTITY).load()


def json_of(content: bytes | bytearray) -> Any:
    try:
        return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except ValueError:
        return content


def with_header(header: Any) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


def entry(**changes: Any) -> dict[str, Any]:
    metadata = {"format": "2", "identity": "{}", "numbers": "{}", "sha256": "0"}
    tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    return {"__metadata__": metadata, "weights": tensor} | changes


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        with_header(b"[" * 100_000),
        with_header(b"\xff"),
        with_header([]),
        with_header(entry(__metadata__=[])),
        with_header(entry(__metadata__={"format": 2})),
        with_header(entry(__metadata__={"identity": "{}", "numbers": "{}"})),
        with_header(entry(weights=None)),
        with_header(entry(weights={"dtype": "F32", "shape": [4]})),
        with_header(entry(weights={"dtype": "F32", "shape": [4], "data_offsets": [0, "16"]})),
        with_header(entry(weights={"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]})),
        with_header(entry(weights={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]})),
        with_header(entry(weights={"dtype": "F32", "shape": [True], "data_offsets": [0, 4]})),
        with_header(entry(weights={"dtype": "F32", "shape": 4, "data_offsets": [0, 16]})),
        with_header(entry(weights={"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]})),
        with_header(entry(weights={"dtype": "Q4", "shape": [4], "data_offsets": [0, 16]})),
        with_header(entry(other={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]})),
        with_header(entry()),
    ],
)
def test_forged_headers_are_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(ValueError, match=r"state cannot be read .*; delete it to start afresh"):
        Checkpoint.peek(tmp_path / "state")


@pytest.mark.parametrize("key", ["identity", "numbers"])
@pytest.mark.parametrize("value", ["[]", "null", "x", ""])
def test_forged_json_is_refused_by_name(key: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash is made to agree."""
    digest = checkpoint_module._digest

    def forge(tensors: Any, header: dict[str, str]) -> str:
        header[key] = value
        return digest(tensors, header)

    monkeypatch.setattr(checkpoint_module, "_digest", forge)
    Checkpoint(tmp_path / "state", IDENTITY).save(state())
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"state cannot be read .*; delete it to start afresh"):
        Checkpoint.peek(tmp_path / "state")


WRITER = """
import sys, torch
from pathlib import Path
from expander_sae.training.checkpoint import Checkpoint
checkpoint, number = Checkpoint(Path(sys.argv[1]), {}), 0
while Path(sys.argv[2]).exists():
    number += 1
    tensors = {f"w{i}": torch.full((97 + i,), float(number)) for i in range(number % 5 + 1)}
    checkpoint.save((tensors, {"number": number}))
"""


def test_a_reader_never_sees_two_checkpoints_in_one(tmp_path: Path) -> None:
    path, running = tmp_path / "state", tmp_path / "running"
    Checkpoint(path, {}).save(({"w0": torch.zeros(97)}, {"number": 0}))
    running.touch()
    source = str(Path(checkpoint_module.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": source + os.pathsep + os.environ.get("PYTHONPATH", "")}
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(running)], env=environment)
    try:
        seen, deadline = set(), time.monotonic() + 60
        while len(seen) < 300 and time.monotonic() < deadline:
            saved = Checkpoint.peek(path)
            number = saved.numbers["number"]
            assert all((tensor == number).all() for tensor in saved.tensors.values())
            seen.add(number)
    finally:
        running.unlink()
        assert writer.wait(60) == 0
    assert len(seen) > 20


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
