"""Text: documents from a source, and windows of token ids made of them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from expander_sae.files import sha256_file, user_path
from expander_sae.lm.embedded import EMBEDDED, Split, fetch_text, in_split
from expander_sae.lm.packing import Separator, pack
from expander_sae.lm.readers import KINDS, TextError, kind_of, read_file, text_of

PILE = "monology/pile-uncopyrighted"  # the source of the paper's activations, streamed
TEXT_FIELD = "text"
_KINDS = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"


def documents(source: str | Path, split: Split = "train", *, text_field: str = TEXT_FIELD) -> Iterator[str]:
    """The documents of a text source, in its order.

    ``source``: ``"embedded"`` (Wikipedia articles, no hub needed), a file (see :func:`~.readers.read_file`), a folder
    of files (all but ``.json``, which may be anything), or a dataset id of the Hugging Face hub, streamed (its split
    ``train``). ``text_field``: the field of a record that holds the text.
    ``split``: ``"heldout"`` is every tenth document (the second, twelfth, …), ``"train"`` the others,
    ``"all"`` both: train and held-out text never share a document.

    Raises ``TextError`` for a source that is missing, malformed or unreachable, or has a single document of which a
    part is to be held out; ``ValueError`` for an unknown split, ``ImportError`` if a dataset is asked for and
    ``datasets`` is not installed.
    """
    in_split(0, split)  # refuses an unknown split here, not at the first document
    name = str(source)
    if name == EMBEDDED:
        return (text for _, text in fetch_text(split))
    files = _files(name)
    if split == "heldout" and files is not None and len(files) == 1 and kind_of(files[0]) == ".txt":
        raise _single(name)  # at once: a model may have to be loaded before the first document is read
    if files is None:
        found = _read_dataset(name, text_field)
    else:
        found = itertools.chain.from_iterable(read_file(path, text_field) for path in files)
    return _of_split(name, found, split)


def _of_split(name: str, found: Iterator[str], split: Split) -> Iterator[str]:
    number = -1
    for number, text in enumerate(found):
        if in_split(number, split):
            yield text
    if number == 0 and split == "heldout":
        raise _single(name)


def _single(name: str) -> TextError:
    return TextError(
        f"{name} is a single document: no part of it is held out. If nothing was trained on it, use all of it "
        "(split 'all', on the command line --split all); else name another text, or cut it into several documents "
        "(the lines of a .jsonl file)."
    )


def describe(source: str | Path, split: Split = "train", *, text_field: str = TEXT_FIELD) -> str:
    """One line that names the text exactly: source, split, field if it is not ``text``, a hash of files' content."""
    files = None if str(source) == EMBEDDED else _files(str(source))
    facts = [split] if text_field == TEXT_FIELD else [split, f"field {text_field}"]
    if files is not None:
        digest = hashlib.sha256("".join(sha256_file(path) for path in files).encode()).hexdigest()
        facts.append(f"sha256 {digest[:16]}")
    return f"{source} ({', '.join(facts)})"


def sample_windows(
    tokenizer: Any,
    source: str | Path,
    split: Split,
    window: int,
    count: int,
    *,
    spread: int = 8,
    bos: bool = False,
    concatenate: bool = True,
    separator: Separator = "eos",
    text_field: str = TEXT_FIELD,
) -> torch.Tensor:
    """``count`` windows ``(count, window)`` int64, evenly spaced over the first ``spread * count`` of a
    source, so that a few windows still come from many documents.

    Fewer than ``count`` come back if the source has no more. Arguments and errors otherwise as ``documents`` and
    ``pack``.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    how: dict[str, Any] = {"bos": bos, "concatenate": concatenate, "separator": separator}
    packed = pack(tokenizer, documents(source, split, text_field=text_field), window, **how)
    read = list(itertools.islice(packed, spread * count))
    chosen = range(len(read)) if len(read) <= count else [i * len(read) // count for i in range(count)]
    return torch.stack([read[i] for i in chosen])


def _files(source: str) -> list[Path] | None:
    """The files of a local source in order, or None if it is a dataset id."""
    path = user_path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if kind_of(file) not in (None, ".json") and file.is_file())
        if not files:
            raise TextError(f"The folder {source} holds no text files ({_KINDS}, but .json; they may be packed: .gz).")
        return files
    if path.is_file():
        if kind_of(path) is None:
            raise TextError(f"{source}: text must be a {_KINDS} file (or .gz of one), not {path.suffix!r}.")
        return [path]
    if kind_of(path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise TextError(f"There is no text file or folder {source}.")
    return None


def _read_dataset(name: str, field: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"Streaming the dataset {name} needs `datasets`: run `pip install datasets`, "
            f"or use a file of text, or the text {EMBEDDED!r}."
        ) from error
    try:
        for number, row in enumerate(load_dataset(name, split="train", streaming=True), start=1):
            yield text_of(dict(row), field, f"The dataset {name}, row {number},")
    except TextError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # hub errors are OSErrors; datasets adds ValueErrors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TextError(
            f"Could not read the dataset {name}: {reason}\n"
            "Check the id and the connection to the Hugging Face hub, or use a file of text, a folder "
            f"of these, or the text {EMBEDDED!r}, which comes from the package index."
        ) from error
