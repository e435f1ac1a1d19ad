"""Writing a store: resumed after kills, one writer at a time, what is refused, full disks."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from support.stores import (
    META,
    Crash,
    contents,
    everything,
    harvest,
    leave_early,
    window,
)

from expander_sae import files
from expander_sae.data import (
    ActivationStore,
    Manifest,
    StoreError,
    StoreWriter,
    planned_bytes,
)
from expander_sae.data import writer as writer_module

KILLED_HARVEST = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support import stores
from expander_sae.data import manifest, writer
where, calls = {where!r}, 0
def kill_self(original, at):
    def run(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return run
if where == "inside a shard":        # the temporary file is written, not yet renamed
    writer.sha256_file = kill_self(writer.sha256_file, 2)
elif where == "before the manifest":  # the second shard is in place, the manifest (third) does not list it
    manifest.Manifest.write = kill_self(manifest.Manifest.write, 3)
else:                                 # all shards listed, the store not yet marked complete (sixth)
    manifest.Manifest.write = kill_self(manifest.Manifest.write, 6)
stores.harvest(Path({folder!r}))
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
@pytest.mark.parametrize(
    ("where", "rows", "leftovers"),
    [
        ("inside a shard", 21, [".shard-00001.safetensors."]),
        ("before the manifest", 21, ["shard-00001.safetensors"]),
        ("before the end", 70, []),
    ],
)
def test_resume_after_a_kill(folder: Path, tmp_path: Path, where: str, rows: int, leftovers: list[str]) -> None:
    killed = tmp_path / "killed"
    script = KILLED_HARVEST.format(tests=str(Path(__file__).parents[1]), where=where, folder=str(killed))
    source = str(Path(writer_module.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": source + os.pathsep + os.environ.get("PYTHONPATH", "")}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr

    with pytest.raises(StoreError, match=f"unfinished: {rows} rows"):
        ActivationStore.open(killed)
    whole = ActivationStore.open(killed, verify="sha256", allow_incomplete=True)
    assert torch.equal(whole.rows(slice(None)), everything()[:rows].bfloat16())
    listed = {"manifest.json", ".lock", *(shard.file for shard in whole.manifest.shards)}
    unlisted = sorted(set(os.listdir(killed)) - listed)
    assert [name.startswith(prefix) for name, prefix in zip(unlisted, leftovers, strict=True)] == [
        True for _ in leftovers
    ]

    finished = (killed / "shard-00000.safetensors").stat().st_mtime_ns
    harvest(killed)
    assert (killed / "shard-00000.safetensors").stat().st_mtime_ns == finished  # not done again
    assert contents(killed) == contents(folder)  # byte for byte an uninterrupted harvest


@pytest.mark.parametrize(("error", "kept"), [(KeyboardInterrupt, 35), (Crash, 21)])
def test_leaving_early_leaves_a_store_to_resume(tmp_path: Path, error: type[BaseException], kept: int) -> None:
    leave_early(tmp_path, error, appends=5, shard_rows=20)
    manifest = Manifest.read(tmp_path)
    assert (manifest.num_rows, manifest.cursor, manifest.complete) == (kept, kept // 7, False)
    harvest(tmp_path)
    assert torch.equal(ActivationStore.open(tmp_path).rows(slice(None)), everything().bfloat16())


@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupt_while_committing_neither_loses_nor_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    write, calls = Manifest.write, itertools.count()

    def interrupted(self: Manifest, folder: Path) -> None:
        call = next(calls)
        if call == 2 and when == "before":
            raise KeyboardInterrupt
        write(self, folder)
        if call == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Manifest, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harvest(tmp_path)
    store = ActivationStore.open(tmp_path, verify="sha256", allow_incomplete=True)
    assert torch.equal(store.rows(slice(None)), everything()[:42].bfloat16())
    harvest(tmp_path)
    assert torch.equal(ActivationStore.open(tmp_path).rows(slice(None)), everything().bfloat16())


@pytest.mark.parametrize(
    "change",
    [
        {"model": "another"},
        {"revision": "main"},
        {"tokenizer": "another"},
        {"hook": "mlp"},
        {"layer": 4},
        {"d_in": 7},
        {"dtype": "float32"},
        {"text": "verse"},
        {"window": 9},
        {"skip_positions": (0, 1)},
        {"max_norm_multiple": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_resume_with_other_settings_names_the_field(tmp_path: Path, change: dict[str, Any]) -> None:
    leave_early(tmp_path, Crash, appends=1, shard_rows=1)
    before = contents(tmp_path)
    ((name, value),) = change.items()
    with pytest.raises(StoreError, match="other settings") as caught:
        StoreWriter(tmp_path, replace(META, **change), expected_rows=70)
    assert f"({name}: {getattr(META, name)!r}, not {value!r})" in str(caught.value)
    assert contents(tmp_path) == before


def test_a_finished_store_is_not_written_again(folder: Path) -> None:
    with pytest.raises(StoreError, match="finished"):
        StoreWriter(folder, META, expected_rows=70)
    with StoreWriter(folder.parent / "new", META, expected_rows=7) as writer:
        writer.append(*window(0), cursor=0)
    with pytest.raises(StoreError, match="finished"):
        writer.append(*window(1), cursor=0)


def test_resume_finds_a_damaged_shard(tmp_path: Path) -> None:
    leave_early(tmp_path, Crash, appends=1, shard_rows=1)
    (tmp_path / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors has 0 bytes"):
        StoreWriter(tmp_path, META, expected_rows=70)


def test_shards_without_a_manifest_are_not_overwritten(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    before = contents(folder)
    with pytest.raises(StoreError, match=r"no manifest\.json"):
        StoreWriter(folder, META, expected_rows=70)
    assert contents(folder) == before


def test_a_harvest_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no rows"), StoreWriter(tmp_path, META, expected_rows=70) as writer:
        writer.append(*window(0, rows=0), cursor=1, left_out_by_norm=7)


def test_trailing_empty_appends_are_counted(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, META, expected_rows=70, shard_rows=1) as writer:
        writer.append(*window(0), cursor=1)
        writer.append(*window(1, rows=0), cursor=2, left_out_by_norm=7)
    manifest = ActivationStore.open(tmp_path).manifest
    assert (manifest.num_rows, manifest.left_out_by_norm, manifest.cursor) == (7, 7, 2)


@pytest.mark.skipif(os.name != "posix", reason="no locks there")
def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, META, expected_rows=70, shard_rows=1) as writer:
        writer.append(*window(0), cursor=1)
        before = contents(tmp_path)
        with pytest.raises(files.FolderInUse, match=rf"an activation store is written by process {os.getpid()} on"):
            StoreWriter(tmp_path, META, expected_rows=70)
        assert contents(tmp_path) == before
        with pytest.raises(StoreError, match="is unfinished"):
            ActivationStore.open(tmp_path)  # readers need no lock
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "shard-00000.safetensors"]
    for error, message in ((StoreError, "finished"), (StoreError, "finished")):  # a failed start unlocks
        with pytest.raises(error, match=message):
            StoreWriter(tmp_path, META, expected_rows=70)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (torch.ones(4, 6, dtype=torch.int32), torch.arange(4), "floating-point, not torch.int32"),
        (torch.ones(4, 5), torch.arange(4), r"\(b, 6\), not \(4, 5\)"),
        (torch.ones(6), torch.arange(6), r"\(b, 6\), not \(6,\)"),
        (torch.ones(4, 6), torch.arange(3), r"tokens must be integers of shape \(4,\)"),
        (torch.ones(4, 6), torch.ones(4), "tokens must be integers"),
        (torch.tensor([[1.0] * 6, [float("nan")] * 6, [float("inf")] * 6]), torch.arange(3), "2 of 3"),
        (torch.full((1, 6), 1e39, dtype=torch.float64), torch.arange(1), "1 of 1 .* in bfloat16"),
    ],
)
def test_append_refuses(tmp_path: Path, rows: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with StoreWriter(tmp_path, META, expected_rows=70) as writer:
        writer.append(*window(0), cursor=1)
        with pytest.raises(StoreError, match=message):
            writer.append(rows, labels, labels, cursor=2)
        with pytest.raises(TypeError):  # a cursor that is no JSON
            writer.append(*window(1), cursor=object())
    assert (len(ActivationStore.open(tmp_path)), Manifest.read(tmp_path).cursor) == (7, 1)


def test_meta_and_sizes_refused(tmp_path: Path) -> None:
    for change, message in (({"dtype": "int8"}, "int8.*float32"), ({"d_in": 0}, "d_in")):
        with pytest.raises(StoreError, match=message):
            replace(META, **change)
    for sizes in ({"expected_rows": 0}, {"expected_rows": 5, "shard_rows": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            StoreWriter(tmp_path, META, **sizes)


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = planned_bytes(70, 6, "bfloat16")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, free))  # type: ignore
    with pytest.raises(OSError, match=r"activation store needs 1\.4 KiB.* has 1\.4 KiB free"):
        harvest(tmp_path / "store")
    assert not (tmp_path / "store").exists()
    monkeypatch.undo()
    leave_early(tmp_path / "store", Crash, appends=1, shard_rows=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, free))  # type: ignore
    harvest(tmp_path / "store")  # on resuming, only the missing rows need room


def test_a_disk_that_fills_up_leaves_a_store_to_resume(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = writer_module.save_file, itertools.count()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if next(calls) == 1:
            path.write_bytes(b"half a shard")
            raise SafetensorError("I/O error: No space left on device")
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(writer_module, "save_file", full)
    with pytest.raises(OSError, match=r"shard-00001.*No space left"):
        harvest(tmp_path / "full")
    assert sorted(os.listdir(tmp_path / "full")) == ["manifest.json", "shard-00000.safetensors"]
    harvest(tmp_path / "full")
    assert contents(tmp_path / "full") == contents(folder)
