"""Files on disk: atomic writes, what kills leave behind, folder locks, hashes, the cache folder, room on the disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shlex
import shutil
import socket
import sys
import time
import warnings
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

if sys.platform != "win32":
    import fcntl

LOCK_NAME = ".lock"


def user_path(path: str | Path) -> Path:
    """``path`` with ``~`` and ``~name`` resolved; one that names no user is left as it is."""
    with contextlib.suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def cache_dir() -> Path:
    """Folder for what the program fetches once: ``EXPANDER_SAE_CACHE``, else ``~/.cache/expander-sae``."""
    override = os.environ.get("EXPANDER_SAE_CACHE")
    return user_path(override) if override else _home_cache()


def _home_cache() -> Path:
    return Path.home() / ".cache" / "expander-sae"


# --- atomic writes ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path of the same name; on success fsync it and rename it into place.

    A reader sees the old file or the whole new one, never a part. On an exception (Ctrl-C included) the
    temporary file is removed and ``path`` is left as it was; after a kill ``remove_leftovers`` finds it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own, since some libraries write a temporary file of theirs beside the one they are given.
    with temporary_folder(path.parent, path.name) as folder:
        temporary = folder / path.name
        temporary.touch()
        yield temporary
        settle(folder)
        os.replace(temporary, path)
        _fsync_folder(path.parent)


@contextlib.contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new empty folder in ``parent`` with the usual permissions, removed at the end.

    Its name, ``.NAME.HOST-PID-RANDOM.tmp``, says whose it is: ``remove_leftovers`` reads that after a kill.
    """
    folder = parent / f".{name}.{_host_mark()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    _alive.add(folder.name)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _alive.discard(folder.name)


def settle(folder: Path) -> None:
    """Give the files of a new folder the permissions that the umask asks for, and bring their bytes to the disk."""
    mode = folder.stat().st_mode & 0o666  # as the folder was made: some libraries make their files 0600
    for path in folder.iterdir():
        path.chmod(mode)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as readable JSON to ``path`` atomically. ``ValueError`` on NaN or infinity."""
    atomic_write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def _fsync_folder(folder: Path) -> None:
    if os.name != "posix":  # other systems cannot open a folder for fsync
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- what a kill leaves behind ----------------------------------------------------------------------------

_alive: set[str] = set()  # temporary folders of this process that are in use


def remove_leftovers(folder: str | Path, *, locked: bool = False) -> list[Path]:
    """Remove temporary folders in ``folder`` (not below it) that a killed ``atomic_path`` or ``temporary_folder`` left.

    Removed are those whose process has ended; with ``locked`` (the caller holds the lock of this folder) those of
    other machines too, of which that cannot be known. Those in use by this process stay. Returns what was removed.
    """
    removed = []
    for path in Path(folder).glob(".*.tmp"):
        owner = path.name.removesuffix(".tmp").rpartition(".")[2].split("-")
        if len(owner) != 3 or not owner[1].isascii() or not owner[1].isdigit() or path.name in _alive:
            continue  # not named by temporary_folder, or in use
        pid = int(owner[1])
        ended = pid == os.getpid() or not _is_running(pid) if owner[0] == _host_mark() else locked
        if ended:
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def _host_mark() -> str:
    """Eight hex digits for the machine and its numbering of processes (a container has its own)."""
    try:
        numbering = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbering = ""
    return hashlib.sha256(f"{socket.gethostname()} {numbering}".encode()).hexdigest()[:8]


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # there, signal 0 would end it
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


# --- locks ------------------------------------------------------------------------------------------------


class FolderInUse(OSError):
    """Another process writes in this folder; the message names it."""


class FolderLock:
    """The lock of one folder, held. Made by ``folder_lock``; a context manager.

    ``release()`` may be called twice; a lock that nothing refers to any more is released, too.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.release = weakref.finalize(self, _release, path, descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def folder_lock(folder: str | Path, what: str, *, wait: bool = False) -> FolderLock:
    """Lock a folder (made if missing) against other writers that ask for its lock; readers need none.

    The system itself drops the lock when its process ends, killed or not. The file ``.lock`` says who holds it
    (``what`` is done, process, machine, command, since when); after a kill it stays, without meaning, until the
    next owner. Not passed on to forked children. On a disk or system without such locks a warning says so.

    Raises ``FolderInUse``, which names the owner, if the lock is held, by this process too; with ``wait`` it
    says so on stderr and waits.
    """
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    told = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(descriptor, wait=False):
                owner = _owner(descriptor)
                if not wait:
                    raise FolderInUse(
                        f"{folder} is in use: {owner}. Wait until it has ended, end it, or choose another folder."
                    )
                if not told:
                    print(f"Waiting for {folder}, in use: {owner} …", file=sys.stderr)
                told = True
                _lock(descriptor, wait=True)
            if _is_file(descriptor, path):  # else the last owner removed the file on leaving
                owner = {"what": what, "pid": os.getpid(), "host": socket.gethostname()}
                owner |= {"command": shlex.join(sys.argv), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, (json.dumps(owner, indent=2) + "\n").encode(), 0)
                _held.add(descriptor)
                return FolderLock(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


_held: set[int] = set()  # descriptors of the locks of this process


def _lock(descriptor: int, wait: bool) -> bool:
    """Whether the lock was taken (or there is none to take)."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        warnings.warn("This disk has no file locks: start no second writer in the same folder.", stacklevel=3)
    return True


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 2**16, 0))
        return "{what} by process {pid} on {host} since {since} (`{command}`)".format_map(owner)
    except (ValueError, LookupError, TypeError):  # between its locking and its writing
        return "by another process"


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _release(path: Path, descriptor: int) -> None:
    if descriptor not in _held:
        return  # a child's copy
    _held.discard(descriptor)
    if _is_file(descriptor, path):
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: nobody else can hold this file, and who waits for it looks again
    os.close(descriptor)


def _forget_locks() -> None:
    for descriptor in _held:
        os.close(descriptor)  # the parent's lock stays; it must not outlive the parent in the child
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


# --- hashes -----------------------------------------------------------------------------------------------


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_identity(path: str | Path) -> list[int]:
    """Device, inode, size, times (ns) of the last change of the bytes and of the entry. ``OSError`` if missing."""
    stat = os.stat(path)
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def known_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read once for each ``file_identity`` and remembered in the user's cache.

    A hash takes about a second for each gigabyte (with SHA instructions in the processor; three without); a
    second call, in any process, none. What changes bytes behind the file system's back (a failing disk) after
    the first reading is not seen: ``sha256_file`` reads always.
    """
    path = Path(os.path.abspath(path))
    identity = file_identity(path)
    records = _record_files(path.parent)
    for record in records:
        for line in reversed(_record_lines(record, path.name)):
            if line.get("name") == path.name and line.get("identity") == identity:
                return str(line.get("sha256"))
    found = sha256_file(path)
    # A clock ticks in steps of up to 10 ms: a change within the tick of the last one would not show.
    settled = time.time_ns() - max(identity[3:]) > 50_000_000
    if settled and file_identity(path) == identity:
        line = {"folder": str(path.parent), "name": path.name, "identity": identity, "sha256": found}
        _remember(records, line)
    return found


def _record_files(folder: Path) -> list[Path]:
    """The files that may remember hashes of ``folder``: in the cache; at home, where a shared cache is read-only."""
    name = f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.jsonl"
    return [root / "hashes" / name for root in dict.fromkeys((cache_dir(), _home_cache()))]


def _record_lines(record: Path, containing: str) -> list[dict[str, Any]]:
    try:
        text = record.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        if containing in line:
            with contextlib.suppress(ValueError, RecursionError):  # a damaged line is none: hash again
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def _remember(records: list[Path], line: dict[str, Any]) -> None:
    """Append to the first record that can be written; none is needed."""
    for record in records:
        with contextlib.suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            if not record.exists():
                _forget_missing_folders(record.parent)
            with open(record, "ab") as file:  # one write, at the end: other processes do the same
                file.write((json.dumps(line) + "\n").encode())
            return


def _forget_missing_folders(records: Path) -> None:
    for record in records.glob("*.jsonl"):
        lines = _record_lines(record, '"folder"')
        if not lines or not os.path.isdir(str(lines[0].get("folder"))):
            record.unlink(missing_ok=True)


# --- room on the disk -------------------------------------------------------------------------------------


def require_free_space(folder: str | Path, needed: int, what: str) -> None:
    """Raise ``OSError`` unless the disk of ``folder`` has ``needed`` bytes free, and 1 % to spare."""
    folder = Path(folder)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed * 1.01:
        raise OSError(
            f"{what} needs {human_bytes(needed)}, but the disk of {folder} has {human_bytes(free)} free. "
            "Free some room, choose another folder, or ask for fewer tokens."
        )


def human_bytes(count: float) -> str:
    """``1536`` -> ``'1.5 KiB'``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(abs(count), 1) < 1024:  # as printed: never "1024.0 KiB"
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
