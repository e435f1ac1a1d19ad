"""Every kind of text file gives the same documents, and what is wrong with one is said with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pytest

from expander_sae.lm import TextError, documents

TEXTS = ["w1 w2\nw3", 'w4, "w5"', "é w6"]


def records(field: str) -> list[dict[str, str]]:
    return [{"id": str(i), field: text} for i, text in enumerate(TEXTS)]


def write(path, field="text", bom=False):
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records(field)), path)
        return path
    file = io.StringIO(newline="")
    if kind == "jsonl":
        file.write("".join(json.dumps(record) + "\n" for record in records(field)))
    elif kind == "json":
        json.dump(records(field), file)
    else:
        writer = csv.DictWriter(file, ["id", field])
        writer.writeheader()
        writer.writerows(records(field))
    content = (("\ufeff" if bom else "") + file.getvalue()).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"])
@pytest.mark.parametrize("bom", [False, True])
def test_every_kind_holds_the_same_documents(tmp_path, name: str, bom: bool) -> None:
    if bom and "parquet" in name:
        pytest.skip("no text file")
    path = write(tmp_path / name, bom=bom)
    assert list(documents(path, "all")) == TEXTS
    with pytest.raises(TextError, match=r'no field "body", only id, text.*--text-field'):
        list(documents(path, "all", text_field="body"))
    path = write(tmp_path / name, field="body")
    assert list(documents(path, "all", text_field="body")) == TEXTS


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (json.dumps(TEXTS), TEXTS),
        (json.dumps({"text": "one"}), ["one"]),
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),  # JSON Lines by another name
    ],
)
def test_other_shapes_of_json(tmp_path, content: str, texts: list[str]) -> None:
    (tmp_path / "a.json").write_text(content)
    assert list(documents(tmp_path / "a.json", "all")) == texts


def test_a_byte_order_mark_is_no_text(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfw1")
    assert list(documents(tmp_path / "a.txt", "all")) == ["w1"]


def test_long_fields_of_csv(tmp_path) -> None:
    text = "w1 " * 100_000
    (tmp_path / "a.csv").write_text(f'text\n"{text}"\n')
    assert list(documents(tmp_path / "a.csv", "all")) == [text]


def test_the_home_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl")
    assert list(documents("~/a.jsonl", "all")) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "a.json is not JSON"),
        ("a.json", b"[1]", r"a.json, item 1: expected a JSON object .* not int"),
        ("a.jsonl.gz", b"not gzip", "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "w1"}' * 200)[:-9], "not a whole gzip file"),
        ("a.parquet", b"PAR1", "not a whole Parquet file"),
        ("a.csv", b"text\n\xff", "not UTF-8"),
        ("a.csv", b"text,more\n", None),
    ],
)
def test_damaged_files(tmp_path, name: str, content: bytes, message: str | None) -> None:
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    if message is None:
        assert list(documents(tmp_path / name, "all")) == []
        return
    with pytest.raises(TextError, match=message):
        list(documents(tmp_path / name, "all"))


def test_a_single_document_has_no_held_out_part(tmp_path) -> None:
    (tmp_path / "one.txt").write_text("w1 w2")
    with pytest.raises(TextError, match=r"single document: .*--split all"):
        documents(tmp_path / "one.txt", "heldout")  # before anything is read
    (tmp_path / "one.jsonl").write_text('{"text": "w1"}\n')
    with pytest.raises(TextError, match=r"single document: .*--split all"):
        list(documents(tmp_path / "one.jsonl", "heldout"))
    assert list(documents(tmp_path / "one.txt", "train")) == ["w1 w2"]
