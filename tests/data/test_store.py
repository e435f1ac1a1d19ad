"""The activation store: round trips, resume after kills, damage found and named, the order of batches."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from expander_sae import files
from expander_sae.data import (
    ActivationStore,
    Manifest,
    StoreError,
    StoreMeta,
    StoreWriter,
    TensorSource,
    planned_bytes,
)
from expander_sae.data import store as store_module
from expander_sae.data import writer as writer_module

META = StoreMeta(
    model="toy",
    revision=None,
    tokenizer="toy",
    hook="residual",
    layer=3,
    d_in=6,
    dtype="bfloat16",
    text="prose",
    window=8,
    max_norm_multiple=10.0,
)
NUM_APPENDS, APPEND_ROWS = 10, 7


class Crash(Exception):
    pass


def window(number: int, meta: StoreMeta = META, rows: int = APPEND_ROWS) -> tuple[torch.Tensor, ...]:
    """What a toy harvest reads at its ``number``-th step: rows, tokens, positions."""
    acts = torch.randn(rows, meta.d_in, generator=torch.Generator().manual_seed(number))
    return acts, torch.arange(rows) + 100 * number, torch.arange(rows) + 1


def harvest(folder: Path, meta: StoreMeta = META, stop: int = NUM_APPENDS, shard_rows: int = 20) -> None:
    """A toy harvest: goes on from the cursor; 20 rows are reached by every third append."""
    with StoreWriter(folder, meta, expected_rows=NUM_APPENDS * APPEND_ROWS, shard_rows=shard_rows) as writer:
        for number in range(writer.cursor or 0, stop):
            writer.append(*window(number, meta), cursor=number + 1, left_out_by_position=1, left_out_by_norm=2)


def leave_early(folder: Path, error: type[BaseException], appends: int, shard_rows: int) -> None:
    """A harvest that ``error`` ends after some appends; the store stays unfinished."""
    with (  # noqa: PT012 (the writer must see the error)
        pytest.raises(error),
        StoreWriter(folder, META, expected_rows=70, shard_rows=shard_rows) as writer,
    ):
        for number in range(appends):
            writer.append(*window(number), cursor=number + 1)
        raise error


def everything(meta: StoreMeta = META) -> torch.Tensor:
    return torch.cat([window(number, meta)[0] for number in range(NUM_APPENDS)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Forge a manifest: its hash of itself is made to agree."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text()) | changes
    del data["sha256"]
    own_hash = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(data | {"sha256": own_hash}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished store of 70 rows in shards of 21, 21, 21 and 7."""
    harvest(tmp_path / "store")
    return tmp_path / "store"


# --- round trips ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    d_in=st.integers(1, 9),
    shard_rows=st.integers(1, 40),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    data=st.data(),
)
def test_what_was_written_is_read(
    sizes: list[int], d_in: int, shard_rows: int, dtype: str, data: st.DataObject
) -> None:
    meta = replace(META, d_in=d_in, dtype=dtype)
    parts = [window(number, meta, rows) for number, rows in enumerate(sizes)]
    acts, tokens, positions = (torch.cat(column) for column in zip(*parts, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        with StoreWriter(folder, meta, expected_rows=sum(sizes), shard_rows=shard_rows) as writer:
            for part in parts:
                writer.append(*part, cursor=None)
            assert writer.num_rows == sum(sizes)
        store = ActivationStore.open(folder, verify="sha256")
        assert (len(store), store.d_in, store.dtype) == (*acts.shape, getattr(torch, dtype))
        assert store.manifest.meta == meta
        assert all(shard.rows >= shard_rows for shard in store.manifest.shards[:-1])
        overhead = store.manifest.num_bytes - planned_bytes(len(store), d_in, dtype)
        assert 0 < overhead <= 512 * len(store.manifest.shards)
        stored = acts.to(store.dtype)
        assert torch.equal(store.rows(slice(None)), stored)
        index = np.array(data.draw(st.lists(st.integers(0, len(acts) - 1), max_size=30)), dtype=np.int64)
        assert torch.equal(store.rows(index), stored[index])  # any order, repeats, none
        assert torch.equal(store.tokens(index), tokens[index].int())
        assert torch.equal(store.positions(index), positions[index].int())
        step = slice(None, None, -3)
        assert torch.equal(store.rows(step), stored[range(*step.indices(len(acts)))])


def test_counts_and_shards(folder: Path) -> None:
    manifest = ActivationStore.open(folder).manifest
    assert [shard.rows for shard in manifest.shards] == [21, 21, 21, 7]
    assert (manifest.left_out_by_position, manifest.left_out_by_norm) == (10, 20)
    assert (manifest.complete, manifest.cursor) == (True, 10)
    on_disk = json.loads((folder / "manifest.json").read_text())
    assert (on_disk["version"], on_disk["num_rows"], on_disk["num_shards"]) == (1, 70, 4)


def test_reading_leaves_the_file_alone(folder: Path) -> None:
    store = ActivationStore.open(folder)
    before = store.rows([0, 1])
    store.rows([0, 1]).zero_()
    assert torch.equal(store.rows([0, 1]), before)
    ActivationStore.open(folder, verify="sha256")


def test_the_writer_keeps_no_view_of_the_callers_buffer(tmp_path: Path) -> None:
    meta = replace(META, dtype="float32")
    acts, _, _ = window(0, meta)
    tokens, positions = torch.zeros(2, len(acts), dtype=torch.int32)
    kept, cursor = acts.clone(), {"at": [0]}
    with StoreWriter(tmp_path, meta, expected_rows=len(acts)) as writer:
        writer.append(acts, tokens, positions, cursor=cursor)
        acts.zero_()
        tokens.fill_(9)
        positions.fill_(9)
        cursor["at"].append(1)
    store = ActivationStore.open(tmp_path)
    assert torch.equal(store.rows(slice(None)), kept)
    assert not store.tokens(slice(None)).any()
    assert not store.positions(slice(None)).any()
    assert store.manifest.cursor == {"at": [0]}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_shards_are_mapped_not_loaded(tmp_path: Path) -> None:
    def private_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    meta, rows = replace(META, d_in=512), 32768  # 32 MiB
    with StoreWriter(tmp_path, meta, expected_rows=rows) as writer:
        labels = torch.zeros(rows, dtype=torch.int32)
        writer.append(torch.ones(rows, 512, dtype=torch.bfloat16), labels, labels, cursor=0)
    del writer
    before, descriptors = private_kib(), len(os.listdir("/proc/self/fd"))
    store = ActivationStore.open(tmp_path)
    for start in range(0, rows, 1024):
        store.rows(slice(start, start + 1024))
    assert private_kib() - before < 12 * 1024
    assert len(os.listdir("/proc/self/fd")) == descriptors  # thousands of shards must not exhaust them


# --- unfinished stores ------------------------------------------------------------------------------------

KILLED_HARVEST = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_store
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
test_store.harvest(Path({folder!r}))
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
    script = KILLED_HARVEST.format(tests=str(Path(__file__).parent), where=where, folder=str(killed))
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


# --- damage -----------------------------------------------------------------------------------------------

SHARD = "shard-00001.safetensors"


def _truncate(folder: Path) -> None:
    with open(folder / SHARD, "rb+") as file:
        file.truncate((folder / SHARD).stat().st_size - 1)


def _lengthen(folder: Path) -> None:
    with open(folder / SHARD, "ab") as file:
        file.write(b"\0")


def _flip(folder: Path, offset: int) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[offset] ^= 1
    (folder / SHARD).write_bytes(data)


def _swap(folder: Path) -> None:
    (folder / SHARD).rename(folder / "aside")
    (folder / "shard-00002.safetensors").rename(folder / SHARD)
    (folder / "aside").rename(folder / "shard-00002.safetensors")


def _take_from_another_layer(folder: Path) -> None:
    harvest(folder.parent / "other", replace(META, layer=4))
    shutil.copy(folder.parent / "other" / SHARD, folder / SHARD)


DAMAGE = {
    "missing": (lambda folder: (folder / SHARD).unlink(), "is missing"),
    "truncated": (_truncate, "bytes, the manifest says"),
    "lengthened": (_lengthen, "bytes, the manifest says"),
    "header": (lambda folder: _flip(folder, 8), "was altered"),
    "swapped": (_swap, "another run"),
    "foreign": (_take_from_another_layer, "another run"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_named(folder: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(StoreError, match=message) as caught:
        ActivationStore.open(folder)
    assert SHARD in str(caught.value)
    assert "harvest again" in str(caught.value)


def test_a_flipped_byte_is_found_before_a_row_is_read(folder: Path) -> None:
    _flip(folder, -1)
    with pytest.raises(StoreError, match=rf"{SHARD} was altered"):
        ActivationStore.open(folder, verify="sha256")
    store = ActivationStore.open(folder)  # does not read the rows
    assert torch.equal(store.rows(slice(0, 21)), everything()[:21].bfloat16())  # another shard
    for read in (store.rows, store.tokens, store.positions):
        for _ in range(2):
            with pytest.raises(StoreError, match=rf"{SHARD} was altered"):
                read([0, 21])
    with pytest.raises(StoreError, match=rf"{SHARD} was altered"):
        take(store, 5, 16, 0)
    with pytest.raises(StoreError, match=rf"{SHARD} was altered"):
        store.sample(70, 0)


def settle_clock() -> None:
    time.sleep(0.07)  # files changed just now are not remembered


def test_each_shard_is_hashed_once_for_all_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    sha256_file = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: (hashed.append(path.name), sha256_file(path))[1])
    settle_clock()
    for _ in range(2):  # a second store knows nothing of the first but the record on disk
        assert torch.equal(ActivationStore.open(folder).rows(slice(None)), everything().bfloat16())
    assert sorted(hashed) == [f"shard-{i:05d}.safetensors" for i in range(4)]
    hashed.clear()
    _flip(folder, -1)
    _flip(folder, -1)  # whole again, but another identity
    settle_clock()
    for _ in range(2):
        ActivationStore.open(folder).rows(slice(None))
    assert hashed == [SHARD]


def test_a_damaged_record_of_hashes_accuses_no_shard(folder: Path) -> None:
    settle_clock()
    ActivationStore.open(folder).rows(slice(None))
    for record in (files.cache_dir() / "hashes").iterdir():
        text = record.read_text()
        for shard in Manifest.read(folder).shards:
            text = text.replace(shard.sha256, "0" * 64)
        record.write_text(text)
    ActivationStore.open(folder).rows(slice(None))


def test_threads_hash_ahead_of_the_reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    all_hashed = threading.Event()

    def known_sha256(path: Path) -> str:
        hashed.append(path.name)
        if len(hashed) == 4:
            all_hashed.set()
        return files.sha256_file(path)

    monkeypatch.setattr(store_module, "known_sha256", known_sha256)
    store = ActivationStore.open(folder)
    assert not hashed  # who only looks at the manifest pays nothing
    store.rows([0])
    assert all_hashed.wait(30)
    store.rows(slice(None))
    assert sorted(hashed) == [f"shard-{i:05d}.safetensors" for i in range(4)]


def test_ctrl_c_while_hashing_leaves_the_shard_to_the_next_reader(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def interrupted(path: Path) -> str:
        if threading.current_thread() is threading.main_thread() and next(calls) == 0:
            raise KeyboardInterrupt
        return files.sha256_file(path)

    monkeypatch.setattr(store_module, "known_sha256", interrupted)
    monkeypatch.setattr(store_module, "_HASHING_THREADS", 0)
    store = ActivationStore.open(folder)
    with pytest.raises(KeyboardInterrupt):
        store.rows([0])
    assert torch.equal(store.rows(slice(None)), everything().bfloat16())


def test_a_shard_replaced_under_an_open_store(folder: Path) -> None:
    store = ActivationStore.open(folder)
    shutil.copy(folder / SHARD, folder / "copy")
    os.replace(folder / "copy", folder / SHARD)
    with pytest.raises(StoreError, match=rf"{SHARD} was replaced since"):
        store.rows(slice(None))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_checks_for_itself(folder: Path) -> None:
    store = ActivationStore.open(folder)
    store.rows([0])
    store._verdicts._ahead.clear()  # as if the parent's threads had taken the rest and not finished
    store._verdicts._verdicts = [type(v)() for v in store._verdicts._verdicts]
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if len(store.rows(slice(None))) == 70 else 1)
    assert os.waitpid(child, 0)[1] == 0


# --- other processes, other places ------------------------------------------------------------------------


def test_a_pickled_store_is_a_path(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(folder.parent)
    store = ActivationStore.open(folder.name)
    pickled = pickle.dumps(store)
    assert len(pickled) < 4000
    monkeypatch.chdir(tmp_path.parent)
    for other in (pickle.loads(pickled), copy.deepcopy(store)):
        assert torch.equal(other.rows(slice(None)), everything().bfloat16())
    shutil.rmtree(folder)
    harvest(folder, shard_rows=30)
    with pytest.raises(StoreError, match="another store than the one that was pickled"):
        pickle.loads(pickled)


def test_workers_of_a_data_loader_read_the_store(folder: Path) -> None:
    class Rows(torch.utils.data.Dataset[torch.Tensor]):
        store = ActivationStore.open(folder)

        def __len__(self) -> int:
            return len(self.store)

        def __getitem__(self, index: int) -> torch.Tensor:
            return self.store.rows([index])[0]

    loader = torch.utils.data.DataLoader(Rows(), batch_size=10, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), everything().bfloat16())


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    harvest(Path("~/store"))
    assert (tmp_path / "store" / "manifest.json").is_file()
    assert len(ActivationStore.open("~/store")) == Manifest.read("~/store").num_rows == 70


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


def test_unknown_verify_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="verify"):
        ActivationStore.open(folder, verify="md5")  # type: ignore[arg-type]


def test_no_manifest(tmp_path: Path, folder: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere", folder / SHARD):
        with pytest.raises(StoreError, match=r"not an activation store.*no manifest\.json"):
            ActivationStore.open(place)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version(folder: Path, version: Any) -> None:
    edit_manifest(folder, version=version)
    with pytest.raises(StoreError, match=f"format version {version!r}, this program reads 1"):
        ActivationStore.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_manifest_that_is_no_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(StoreError, match=r"manifest\.json"):
        ActivationStore.open(folder)


def test_a_manifest_with_pieces_missing_or_changed(folder: Path) -> None:
    whole = json.loads((folder / "manifest.json").read_text())
    del whole["sha256"]  # as first written: a manifest with its hash would be found by that
    broken = [
        {key: value for key, value in whole.items() if key != "cursor"},
        whole | {"meta": {"model": "toy"}},
        whole | {"meta": whole["meta"] | {"dtype": "int8"}},
        whole | {"shards": None},
        whole | {"shards": whole["shards"][:-1]},
        whole | {"shards": whole["shards"][::-1]},
        whole | {"num_rows": 71},
        whole | {"left_out_by_norm": -1},
        whole | {"complete": 1},
        whole | {"sha255": "0" * 64},  # one bit off
        whole | {"meta": whole["meta"] | {"d_in": "6"}},
        whole | {"meta": whole["meta"] | {"dtype": ["bfloat16"]}},
        whole | {"meta": whole["meta"] | {"skip_positions": [0.5]}},
        whole | {"meta": whole["meta"] | {"hoop": "residual"}},
        whole | {"meta": []},
        whole | {"shards": [*whole["shards"][:-1], whole["shards"][-1] | {"rows": True}]},
        whole | {"shards": [*whole["shards"][:-1], whole["shards"][-1] | {"sha256": "x"}]},
        whole | {"shards": [*whole["shards"][:-1], {"file": SHARD}]},
    ]
    for manifest in broken:
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
            ActivationStore.open(folder)
    (folder / "manifest.json").write_text(json.dumps(whole))
    assert len(ActivationStore.open(folder)) == 70  # the old form


def error_or(read: Callable[[], Any]) -> Any:
    """What was read, or the message of the ``StoreError``; any other error is none of ours."""
    try:
        return read()
    except StoreError as error:
        return str(error)


def test_every_flipped_bit_of_a_manifest_is_found(folder: Path) -> None:
    path = folder / "manifest.json"
    whole, manifest = path.read_bytes(), Manifest.read(folder)
    for place in range(0, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        result = error_or(lambda: Manifest.read(folder))
        assert result == manifest or "manifest.json" in result  # the same: white space
    for text in ("[" * 100_000, '{"version": 1, "meta": ' * 2000, '{"version": NaN}', '{"version": true}'):
        path.write_text(text)
        with pytest.raises(StoreError, match=r"manifest\.json"):
            Manifest.read(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match=r"manifest\.json is a folder"):
        Manifest.read(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(place=st.integers(0), value=JSON, remove=st.booleans())
def test_forged_manifests_end_in_a_store_error(
    place: int, value: Any, remove: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any one value replaced or removed, the manifest's own hash made to agree."""
    folder = tmp_path_factory.getbasetemp() / "forged"
    if not folder.exists():
        harvest(folder)
        shutil.copy(folder / "manifest.json", folder / "whole")
    shutil.copy(folder / "whole", folder / "manifest.json")
    data = json.loads((folder / "whole").read_text())
    places: list[tuple[Any, Any]] = []

    def collect(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], (dict, list)):
                collect(inner[key])

    collect(data)
    container, key = places[place % len(places)]
    if remove:
        del container[key]
    else:
        container[key] = value
    path = folder / "manifest.json"
    data.pop("sha256", None)
    own_hash = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(data | {"sha256": own_hash}))
    result = error_or(lambda: ActivationStore.open(folder, allow_incomplete=True).rows(slice(None)).shape)
    assert result == (70, 6) or str(folder) in result


@pytest.mark.parametrize("change", [{"model": "another"}, {"d_in": 7}, {"dtype": "float16"}])
def test_another_models_manifest(folder: Path, change: dict[str, Any]) -> None:
    meta = json.loads((folder / "manifest.json").read_text())["meta"]
    edit_manifest(folder, meta=meta | change)
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors (holds|is a shard of another run)"):
        ActivationStore.open(folder)


def test_a_manifest_with_other_row_counts(folder: Path) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[1]["rows"] -= 1
    shards[2]["rows"] += 1
    edit_manifest(folder, shards=shards)
    with pytest.raises(StoreError, match=rf"{SHARD} holds .*\[21, 6\].* the manifest says .*\[20, 6\]"):
        ActivationStore.open(folder)


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


# --- batches and samples ----------------------------------------------------------------------------------


def numbered(rows: int) -> TensorSource:
    return TensorSource(torch.arange(rows, dtype=torch.float32)[:, None])


def take(source: Any, count: int, *args: int) -> list[torch.Tensor]:
    return list(itertools.islice(source.batches(*args), count))


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 40),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**63),
    start=st.integers(0, 60),
)
def test_a_batch_depends_on_its_step_alone(rows: int, batch_size: int, seed: int, start: int) -> None:
    source, batch_size = numbered(rows), min(batch_size, rows)
    from_zero = take(source, start + 5, batch_size, seed)
    resumed = take(source, 5, batch_size, seed, start)
    assert all(torch.equal(a, b) for a, b in zip(from_zero[start:], resumed, strict=True))
    per_epoch = rows // batch_size
    for epoch in range(len(from_zero) // per_epoch):
        seen = torch.cat(from_zero[epoch * per_epoch : (epoch + 1) * per_epoch]).flatten().tolist()
        assert len(set(seen)) == len(seen) == per_epoch * batch_size
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)
        assert seen == order[: len(seen)].tolist()


def test_batches_of_a_store_and_of_a_tensor_are_the_same(folder: Path) -> None:
    store, source = ActivationStore.open(folder), TensorSource(everything().bfloat16())
    for mine, theirs in zip(take(store, 12, 16, 3), take(source, 12, 16, 3), strict=True):
        assert (mine.shape, mine.dtype) == ((16, 6), torch.bfloat16)
        assert torch.equal(mine, theirs)
    assert torch.equal(store.sample(20, 1), source.sample(20, 1))


def test_seeds_and_epochs_differ() -> None:
    source = numbered(1000)
    epochs = take(source, 3, 1000, 0) + take(source, 1, 1000, 1) + [source.sample(1000, 0)]
    for a, b in itertools.combinations(epochs, 2):
        assert (a == b).float().mean() < 0.02
        assert torch.equal(a.sort(dim=0).values, b.sort(dim=0).values)


def test_sample_is_distinct_and_repeatable() -> None:
    source = numbered(50)
    sample = source.sample(30, 7)
    assert len(sample.unique()) == 30
    assert torch.equal(sample, source.sample(30, 7))
    assert not torch.equal(sample, source.sample(30, 8))
    generator = np.random.Generator(np.random.Philox(key=np.array([7, 2**64 - 1], dtype=np.uint64)))
    assert sample.flatten().tolist() == generator.choice(50, 30, replace=False).tolist()  # no epoch's stream


def test_batches_and_sample_refuse_at_the_call() -> None:
    source = numbered(5)
    for batch_size in (0, 6):
        with pytest.raises(ValueError, match=f"batch_size must be from 1 to the number of rows, 5, not {batch_size}"):
            source.batches(batch_size, seed=0)
        with pytest.raises(ValueError, match=f"number of rows, 5, not {batch_size}"):
            source.sample(batch_size, seed=0)
    for seed in (-1, 2**64):
        for read in (source.batches, source.sample):
            with pytest.raises(ValueError, match=f"seed must be .* not {seed}"):
                read(2, seed=seed)
    with pytest.raises(ValueError, match="start_step"):
        source.batches(2, seed=0, start_step=-1)


def test_row_numbers_refused(folder: Path) -> None:
    for source in (ActivationStore.open(folder), TensorSource(everything())):
        for index in ([70], [-1], [0, 99]):
            with pytest.raises(IndexError, match="there are 70"):
                source.rows(index)
        for index in (np.array([0.5]), np.ones(70, dtype=bool), np.zeros((2, 2), dtype=int)):
            with pytest.raises(TypeError, match="integers of shape"):
                source.rows(index)
        assert source.rows([]).shape == (0, 6)


@pytest.mark.parametrize(
    ("activations", "error", "message"),
    [
        (torch.ones(3, 2, dtype=torch.int64), TypeError, "torch.int64"),
        (np.ones((3, 2)), TypeError, "float64"),
        ([[1.0]], TypeError, "list"),
        (torch.ones(3), ValueError, r"\(3,\)"),
        (torch.ones(3, 2, 2), ValueError, r"\(3, 2, 2\)"),
        (torch.ones(0, 2), ValueError, r"\(0, 2\)"),
        (torch.tensor([[1.0], [float("nan")], [-float("inf")]]), ValueError, "2 of 3"),
    ],
)
def test_tensor_source_refuses(activations: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TensorSource(activations)


def test_tensor_source_gives_copies_without_a_graph() -> None:
    tensor = torch.ones(4, 2, requires_grad=True)
    source = TensorSource(tensor)
    rows = source.rows(slice(0, 4))
    assert not rows.requires_grad
    rows.zero_()
    assert tensor.detach().all()
