"""Files of text: plain, JSON, JSON Lines, CSV, Parquet, and these packed by gzip."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

KINDS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
_PACKED = (".txt", ".jsonl", ".json", ".csv")  # Parquet files are packed inside


class TextError(ValueError):
    """A text source that cannot be read or is too short; the message says what to do."""


def kind_of(path: Path) -> str | None:
    """The kind of a text file by its name (``.jsonl`` for ``a.jsonl.gz``), None if it is no text file."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        inner = Path(path.stem).suffix.lower()
        return inner if inner in _PACKED else None
    return suffix if suffix in KINDS else None


def read_file(path: Path, field: str) -> Iterator[str]:
    """The documents of a text file: a ``.txt`` file is one, the others hold one in the ``field`` of each record.

    Records are the lines of ``.jsonl``, the items of a list in ``.json``, the rows of ``.csv`` (its first line names
    the columns) and ``.parquet``. Items of a JSON list, and lines, may be strings themselves. A byte order mark is
    no part of the text.

    Raises ``TextError`` naming file and record for what cannot be read, ``ImportError`` without ``pyarrow``.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _read_parquet(path, field)
        return
    try:
        with _open(path) as file:
            if kind == ".txt":
                yield file.read()
            elif kind == ".csv":
                yield from _read_csv(path, file, field)
            elif kind == ".json":
                yield from _read_json(path, file, field)
            else:
                yield from _read_lines(path, file, field)
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text: {error}. Convert it first.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TextError(f"{path} is not a whole gzip file: {error}.") from error


def _open(path: Path) -> IO[str]:
    # utf-8-sig: as UTF-8, without the byte order mark that some programs begin a file with.
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="" if kind_of(path) == ".csv" else None)


def _read_lines(path: Path, file: IO[str], field: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TextError(f"{path}, line {number}: not JSON ({error}).") from error
        yield text_of(record, field, f"{path}, line {number}")


def _read_json(path: Path, file: IO[str], field: str) -> Iterator[str]:
    try:
        whole = json.load(file)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise TextError(f"{path} is not JSON ({error}).") from error
        file.seek(0)  # JSON Lines by another name
        yield from _read_lines(path, file, field)
        return
    for number, record in enumerate(whole if isinstance(whole, list) else [whole], start=1):
        yield text_of(record, field, f"{path}, item {number}")


def _read_csv(path: Path, file: IO[str], field: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)  # documents are longer than the 128 KiB that the module allows
    reader = csv.DictReader(file)
    try:
        for record in reader:
            yield text_of(record, field, f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise TextError(f"{path}, line {reader.line_num}: not CSV ({error}).") from error


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"Reading {path} needs `pyarrow`: run `pip install pyarrow`, or convert the file.") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise TextError(f"{path} {_no_field(field, file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield text_of(value, field, f"{path}, row {number}")
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise TextError(f"{path} is not a whole Parquet file: {error}.") from error


def text_of(record: Any, field: str, where: str) -> str:
    """The text of a record: itself, or its field. ``TextError`` that begins with ``where``."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise TextError(f'{where}: expected a JSON object with a field "{field}", not {type(record).__name__}.')
    if field not in record:
        raise TextError(f"{where} {_no_field(field, [str(name) for name in record])}")
    text = record[field]
    if not isinstance(text, str):
        raise TextError(f'{where}: the field "{field}" must be a string, not {type(text).__name__}.')
    return text


def _no_field(field: str, names: list[str]) -> str:
    return (
        f'has no field "{field}", only {", ".join(names) or "none"}. '
        "Name the one that holds the text: text_field=, on the command line --text-field."
    )
