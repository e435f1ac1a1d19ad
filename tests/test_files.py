"""Atomic writes, hashes, room on the disk, the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from expander_sae import files


def test_atomic_path_replaces_whole_files(tmp_path: Path) -> None:
    target = tmp_path / "new" / "result"  # folders are made
    for text in ("first", "second"):
        with files.atomic_path(target) as temporary:
            assert temporary.parent == target.parent
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
