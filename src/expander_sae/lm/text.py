"""Text: documents from a source, packed with EOS between them into windows of token ids."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from expander_sae.files import sha256_file
from expander_sae.lm.embedded import EMBEDDED, Split, fetch_text, in_split

PILE = "monology/pile-uncopyrighted"  # the source of the paper's activations, streamed
_SUFFIXES = (".txt", ".jsonl")


class TextError(ValueError):
    """A text source that cannot be read or is too short; the message says what to do."""


def documents(source: str | Path, split: Split = "train") -> Iterator[str]:
    """The documents of a text source, in its order.

    ``source``: ``"embedded"`` (Wikipedia articles, no hub needed), a ``.txt`` file (one document), a
    ``.jsonl`` file (a document a line, in its field ``text``), a folder of these, or a dataset id of the
    Hugging Face hub, streamed (its split ``train``, field ``text``).
    ``split``: ``"heldout"`` is every tenth document (the second, twelfth, …), ``"train"`` the others,
    ``"all"`` both: train and held-out text never share a document.

    Raises ``TextError`` for a source that is missing, malformed or unreachable, ``ValueError`` for an unknown
    split, ``ImportError`` if a dataset is asked for and ``datasets`` is not installed.
    """
    in_split(0, split)  # refuses an unknown split here, not at the first document
    name = str(source)
    if name == EMBEDDED:
        return (text for _, text in fetch_text(split))
    files = _files(name)
    found = _read_dataset(name) if files is None else itertools.chain.from_iterable(map(_read_file, files))
    return (text for number, text in enumerate(found) if in_split(number, split))


def describe(source: str | Path, split: Split = "train") -> str:
    """One line that names the text exactly: source, split and, for files, a hash of their content."""
    files = None if str(source) == EMBEDDED else _files(str(source))
    if files is None:
        return f"{source} ({split})"
    digest = hashlib.sha256("".join(sha256_file(path) for path in files).encode()).hexdigest()
    return f"{source} ({split}, sha256 {digest[:16]})"


def pack(tokenizer: Any, documents: Iterable[str], window: int) -> Iterator[torch.Tensor]:
    """Windows of token ids, int64 ``(window,)``: the documents end to end, each followed by EOS.

    Documents run on from one window into the next; what is left at the end and fills no window is dropped.

    Raises ``TextError`` at the end if the text did not fill one window, ``ValueError`` for a window below 2
    or a tokenizer without EOS.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, not {window}")
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token to put between documents: set tokenizer.eos_token")
    return _pack(tokenizer, documents, window, eos)


def _pack(tokenizer: Any, documents: Iterable[str], window: int, eos: int) -> Iterator[torch.Tensor]:
    waiting: list[int] = []
    full = False
    for document in documents:
        # verbose=False: documents may be longer than the model's context, windows are not
        waiting += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        waiting.append(eos)
        whole = len(waiting) // window * window
        if whole:
            full = True
            yield from torch.tensor(waiting[:whole], dtype=torch.int64).view(-1, window)
            del waiting[:whole]
    if not full:
        raise TextError(
            f"The text has {len(waiting)} tokens, which is shorter than one window of {window}. "
            "Give more text or a smaller window; a split 'heldout' needs a source of two documents or more "
            "(a .txt file is one document: name another file for it, with split 'all')."
        )


def sample_windows(
    tokenizer: Any, source: str | Path, split: Split, window: int, count: int, *, spread: int = 8
) -> torch.Tensor:
    """``count`` windows ``(count, window)`` int64, evenly spaced over the first ``spread * count`` of a
    source, so that a few windows still come from many documents.

    Fewer than ``count`` come back if the source has no more. Raises as ``documents`` and ``pack`` do.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    read = list(itertools.islice(pack(tokenizer, documents(source, split), window), spread * count))
    chosen = range(len(read)) if len(read) <= count else [i * len(read) // count for i in range(count)]
    return torch.stack([read[i] for i in chosen])


def _files(source: str) -> list[Path] | None:
    """The files of a local source in order, or None if it is a dataset id."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise TextError(f"The folder {source} holds no {' or '.join(_SUFFIXES)} files.")
        return files
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise TextError(f"{source}: text must be a {' or '.join(_SUFFIXES)} file, not {path.suffix!r}.")
        return [path]
    if path.suffix in _SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise TextError(f"There is no text file or folder {source}.")
    return None


def _read_file(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix == ".txt":
                yield file.read()
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text_of(path, number, line)
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text: {error}. Convert it first.") from error


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise TextError(f'{path}, line {number}: expected a JSON object with a field "text" ({error!r}).') from error
    if not isinstance(text, str):
        raise TextError(f'{path}, line {number}: the field "text" must be a string, not {type(text).__name__}.')
    return text


def _read_dataset(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"Streaming the dataset {name} needs `datasets`: run `pip install datasets`, "
            f"or use a .txt or .jsonl file, or the text {EMBEDDED!r}."
        ) from error
    try:
        for row in load_dataset(name, split="train", streaming=True):
            if "text" not in row:
                raise TextError(f"The dataset {name} has no field 'text', only {', '.join(row)}.")
            yield row["text"]
    except TextError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # hub errors are OSErrors; datasets adds ValueErrors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TextError(
            f"Could not read the dataset {name}: {reason}\n"
            "Check the id and the connection to the Hugging Face hub, or use a .txt or .jsonl file, a folder "
            f"of these, or the text {EMBEDDED!r}, which comes from the package index."
        ) from error
