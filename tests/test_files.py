"""Atomic writes, what kills leave, locks, hashes, room on the disk, the cache folder."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import pytest

from expander_sae import files

posix = pytest.mark.skipif(os.name != "posix", reason="locks and process numbers of POSIX")


def test_atomic_path_replaces_whole_files(tmp_path: Path) -> None:
    target = tmp_path / "new" / "result"  # folders are made
    for text in ("first", "second"):
        with files.atomic_path(target) as temporary:
            assert temporary.name == target.name
            assert temporary.parent.parent == target.parent  # the same disk
            temporary.write_text(text)
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == text
        assert os.listdir(target.parent) == ["result"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "result"
    target.write_text("old")
    with pytest.raises(error), files.atomic_path(target) as temporary:  # noqa: PT012 (it must see the error)
        temporary.write_text("half of the n")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["result"]


def test_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replace"), replace(old, new)))
    files.atomic_write_bytes(tmp_path / "result", b"data")
    assert calls[:2] == ["fsync", "replace"]
    assert calls[2:] == (["fsync"] if os.name == "posix" else [])  # the folder's entry


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_results_have_ordinary_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        files.atomic_write_bytes(tmp_path / "result", b"")
        assert os.umask(0o027) == 0o027  # unchanged
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "result").stat().st_mode) == 0o640


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    value = {"text": "é", "list": [1, 2.5, None]}
    files.atomic_write_json(path, value)
    assert json.loads(path.read_bytes()) == value
    for bad in (float("nan"), {"x": float("inf")}):
        with pytest.raises(ValueError, match="not JSON compliant"):
            files.atomic_write_json(path, bad)
    with pytest.raises(TypeError):
        files.atomic_write_json(path, {"x": object()})
    assert json.loads(path.read_bytes()) == value


@pytest.mark.parametrize("size", [0, 1, 300_000])
def test_sha256(tmp_path: Path, size: int) -> None:
    data = b"\x07" * size
    (tmp_path / "data").write_bytes(data)
    assert files.sha256_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()


def test_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> object:
        asked.append(Path(path))
        return shutil._ntuple_diskusage(10**9, 0, 2048)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    files.require_free_space(tmp_path / "not" / "yet", 2000, "The store")
    assert asked == [tmp_path]  # the nearest folder that exists
    for needed in (2048, 5 * 2**30):  # 1 % must stay
        with pytest.raises(OSError, match=r"The store needs .* has 2\.0 KiB free") as caught:
            files.require_free_space(tmp_path, needed, "The store")
        assert files.human_bytes(needed) in str(caught.value)


def test_free_space_of_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.require_free_space("runs/demo", 1, "The store")


def test_human_bytes() -> None:
    written = [files.human_bytes(count) for count in (0, 1023, 1024, 1536, 2**20 - 1, 2**20, 3 * 2**30, 5 * 2**50)]
    assert written == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "1.0 MiB", "3.0 GiB", "5120.0 TiB"]


def test_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EXPANDER_SAE_CACHE", str(tmp_path / "cache"))
    assert files.cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("EXPANDER_SAE_CACHE", "~/elsewhere")  # as written in an env file, where no shell expands it
    assert files.cache_dir() == tmp_path / "elsewhere"
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("EXPANDER_SAE_CACHE")
        else:
            monkeypatch.setenv("EXPANDER_SAE_CACHE", unset)
        assert files.cache_dir() == tmp_path / ".cache" / "expander-sae"


# --- what a kill leaves behind ----------------------------------------------------------------------------


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that runs ``script``, in which ``files`` is imported."""
    source = str(Path(files.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source + os.pathsep + os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-c", "import os, sys, time\nfrom expander_sae import files\n" + textwrap.dedent(script)]
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


WRITE_HALF = """
    with files.atomic_path(sys.argv[1]) as temporary:
        temporary.write_text("half")
        temporary.with_name("a library's own").write_text("half")
        print("written", flush=True)
        time.sleep(60)
"""


@posix
def test_leftovers_of_a_killed_process_are_removed_and_no_others(tmp_path: Path) -> None:
    killed, alive = python(WRITE_HALF, tmp_path / "killed"), python(WRITE_HALF, tmp_path / "alive")
    try:
        assert wait_for_line(killed) == wait_for_line(alive) == "written"
        killed.kill()
        killed.communicate()
        (tmp_path / ".foreign.tmp").write_text("not ours")
        (tmp_path / ".result.a-b-c.tmp").write_text("not ours")
        other_machine = tmp_path / f".result.00000000-{killed.pid}-01234567.tmp"
        other_machine.mkdir()
        with files.temporary_folder(tmp_path, "mine") as mine:
            removed = files.remove_leftovers(tmp_path)
            assert [path.name.split(".")[1] for path in removed] == ["killed"]
            assert files.remove_leftovers(tmp_path) == []
            assert files.remove_leftovers(tmp_path, locked=True) == [other_machine]
            assert mine.is_dir()
        left = sorted(name.split(".")[1] for name in os.listdir(tmp_path))
        assert left == ["alive", "foreign", "result"]
    finally:
        alive.kill()
        alive.communicate()


@posix
def test_leftovers_of_an_earlier_process_of_the_same_number(tmp_path: Path) -> None:
    with files.temporary_folder(tmp_path, "x") as folder:  # a container's program is number 1 at every start
        copy = folder.with_name(folder.name[:-12] + "01234567.tmp")
        copy.mkdir()
        assert files.remove_leftovers(tmp_path) == [copy]
        assert folder.is_dir()


def test_a_folder_is_settled_with_ordinary_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append("fsync"), fsync(descriptor)))
    old = os.umask(0o022)
    try:
        with files.temporary_folder(tmp_path, "result") as folder:
            (folder / "private").write_text("")
            (folder / "private").chmod(0o600)
            files.settle(folder)
            if os.name == "posix":
                assert stat.S_IMODE(folder.stat().st_mode) == 0o755
                assert stat.S_IMODE((folder / "private").stat().st_mode) == 0o644
    finally:
        os.umask(old)
    assert synced == ["fsync"]
    assert os.listdir(tmp_path) == []


# --- locks ------------------------------------------------------------------------------------------------

HOLD = """
    lock = files.folder_lock(sys.argv[1], "a test")
    print("held", flush=True)
    time.sleep(60)
"""


@posix
def test_a_lock_names_its_owner_and_ends_with_it(tmp_path: Path) -> None:
    holder = python(HOLD, tmp_path / "run")
    try:
        assert wait_for_line(holder) == "held"
        owner = json.loads((tmp_path / "run" / files.LOCK_NAME).read_text())
        assert (owner["what"], owner["pid"]) == ("a test", holder.pid)
        message = rf"run is in use: a test by process {holder.pid} on \S+ since 20.* UTC \(`.*\).*another folder"
        started = time.monotonic()
        with pytest.raises(files.FolderInUse, match=message):
            files.folder_lock(tmp_path / "run", "mine")
        assert time.monotonic() - started < 5
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / "run" / files.LOCK_NAME).exists()  # it could not tidy up
    with files.folder_lock(tmp_path / "run", "mine"):
        assert json.loads((tmp_path / "run" / files.LOCK_NAME).read_text())["what"] == "mine"
    assert os.listdir(tmp_path / "run") == []


@posix
def test_a_lock_excludes_its_own_process_and_is_released_once(tmp_path: Path) -> None:
    first = files.folder_lock(tmp_path, "first")
    with pytest.raises(files.FolderInUse, match=rf"first by process {os.getpid()}"):
        files.folder_lock(tmp_path, "second")
    first.release()
    second = files.folder_lock(tmp_path, "second")
    first.release()  # must not release the other's
    with pytest.raises(files.FolderInUse, match="second by"):
        files.folder_lock(tmp_path, "third")
    del second  # forgotten
    files.folder_lock(tmp_path, "fourth").release()


@posix
def test_who_waits_gets_the_lock_when_it_is_free(tmp_path: Path) -> None:
    first = files.folder_lock(tmp_path, "first")
    waiters = [
        python(
            """
            with files.folder_lock(sys.argv[1], "waiter", wait=True):
                with open(sys.argv[2], "a") as log:
                    log.write("in "), log.flush(), time.sleep(0.2), log.write("out "), log.flush()
            """,
            tmp_path,
            tmp_path / "log",
        )
        for _ in range(3)
    ]
    for waiter in waiters:
        assert waiter.stderr is not None
        assert "in use: first by process" in waiter.stderr.readline()
    assert not (tmp_path / "log").exists()
    first.release()
    for waiter in waiters:
        assert (waiter.communicate()[1], waiter.returncode) == (mock.ANY, 0)
    assert (tmp_path / "log").read_text() == "in out " * 3
    assert os.listdir(tmp_path) == ["log"]


@posix
def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    holder = python(
        """
        lock = files.folder_lock(sys.argv[1], "parent")
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            lock.release()  # the parent's: it stays
            os.write(writing, b"released")
            time.sleep(60)
        os.read(reading, 8)
        print(child, flush=True)
        time.sleep(60)
        """,
        tmp_path,
    )
    child = int(wait_for_line(holder))
    try:
        with pytest.raises(files.FolderInUse, match="parent"):
            files.folder_lock(tmp_path, "mine")
        holder.kill()
        holder.wait()
        files.folder_lock(tmp_path, "mine").release()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.communicate()


@posix
def test_a_lock_on_a_file_that_its_last_owner_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    flock, calls = fcntl.flock, itertools.count()

    def removed_meanwhile(descriptor: int, how: int) -> None:
        if next(calls) == 0:
            (tmp_path / files.LOCK_NAME).unlink()
        flock(descriptor, how)

    monkeypatch.setattr("fcntl.flock", removed_meanwhile)
    with files.folder_lock(tmp_path, "first"), pytest.raises(files.FolderInUse, match="first by"):
        files.folder_lock(tmp_path, "second")


@posix
def test_an_owner_that_has_not_written_yet_and_a_disk_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = files.folder_lock(tmp_path, "first")
    for content in ("", "{", "[]", '{"pid": 1}'):
        lock.path.write_text(content)
        with pytest.raises(files.FolderInUse, match="by another process"):
            files.folder_lock(tmp_path, "second")
    lock.release()

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="no file locks"):
        files.folder_lock(tmp_path, "third").release()


# --- remembered hashes ------------------------------------------------------------------------------------


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that were read to be hashed; the cache is an empty folder."""
    monkeypatch.setenv("EXPANDER_SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    read: list[str] = []
    sha256_file = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: (read.append(path.name), sha256_file(path))[1])
    return read


def settled_file(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    time.sleep(0.07)  # a change within a tick of the clock could not be told from this one
    return path


def test_a_hash_is_read_once_for_each_identity(tmp_path: Path, reads: list[str]) -> None:
    path = settled_file(tmp_path / "data" / "weights", b"one")
    assert files.known_sha256(path) == files.known_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert reads == ["weights"]
    times = path.stat()
    settled_file(path, b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times would
    time.sleep(0.07)
    assert files.known_sha256(path) == hashlib.sha256(b"two").hexdigest()
    other = settled_file(tmp_path / "data" / "other", b"three")
    os.replace(other, path)
    time.sleep(0.07)
    assert files.known_sha256(path) == files.known_sha256(path) == hashlib.sha256(b"three").hexdigest()
    assert reads == ["weights"] * 3
    with pytest.raises(FileNotFoundError):
        files.known_sha256(other)


def test_a_file_changed_just_now_is_not_remembered(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    changed = path.stat().st_mtime_ns
    monkeypatch.setattr(time, "time_ns", lambda: changed + 10_000_000)  # a coarse clock gives a change now this time
    for _ in range(2):
        assert files.known_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 2
    monkeypatch.setattr(time, "time_ns", lambda: changed + 100_000_000)
    for _ in range(2):
        assert files.known_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 3


def test_damaged_records_cost_a_reading_only(tmp_path: Path, reads: list[str]) -> None:
    path = settled_file(tmp_path / "data" / "weights", b"one")
    files.known_sha256(path)
    (record,) = (tmp_path / "cache" / "hashes").iterdir()
    whole = record.read_bytes()
    for damaged in (b"", b"\xff" + whole, whole[:-9], b"[]\n", b"[" * 100_000 + b"weights\n", b'{"name": "weights"}\n'):
        record.write_bytes(damaged + b"\n")
        reads.clear()
        for _ in range(2):
            assert files.known_sha256(path) == hashlib.sha256(b"one").hexdigest()
        assert reads == ["weights"], damaged  # and it is remembered again


def test_records_of_folders_that_are_gone_go(tmp_path: Path, reads: list[str]) -> None:
    for name in ("a", "b"):
        files.known_sha256(settled_file(tmp_path / name / "weights", b"one"))
    assert len(list((tmp_path / "cache" / "hashes").iterdir())) == 2
    shutil.rmtree(tmp_path / "a")
    files.known_sha256(settled_file(tmp_path / "c" / "weights", b"one"))
    assert len(list((tmp_path / "cache" / "hashes").iterdir())) == 2
    assert reads == ["weights"] * 3


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, reads: list[str]) -> None:
    path = settled_file(tmp_path / "data" / "weights", b"one")
    (tmp_path / "cache").write_text("a file where the folder should be")
    for _ in range(2):
        assert files.known_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert reads == ["weights"]  # remembered at home
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home").write_text("")
    for _ in range(2):
        assert files.known_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert reads == ["weights"] * 3


def test_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.user_path("~/x") == tmp_path / "x"
    assert files.user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    with files.folder_lock("~/run", "test") as lock:
        assert lock.path.parent == tmp_path / "run"
