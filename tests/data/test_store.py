"""Reading a store: round trips, altered shards found before their first use, other processes."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stores import (
    META,
    SHARD,
    everything,
    flip,
    harvest,
    take,
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
from expander_sae.data import store as store_module

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


# --- damage -----------------------------------------------------------------------------------------------


def _truncate(folder: Path) -> None:
    with open(folder / SHARD, "rb+") as file:
        file.truncate((folder / SHARD).stat().st_size - 1)


def _lengthen(folder: Path) -> None:
    with open(folder / SHARD, "ab") as file:
        file.write(b"\0")


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
    "header": (lambda folder: flip(folder, 8), "was altered"),
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
    flip(folder, -1)
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
    flip(folder, -1)
    flip(folder, -1)  # whole again, but another identity
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


def test_unknown_verify_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="verify"):
        ActivationStore.open(folder, verify="md5")  # type: ignore[arg-type]


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
