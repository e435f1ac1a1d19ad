"""Text sources, the split by document, and packing."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.lm import WORDS, tiny_tokenizer

from expander_sae.lm import TextError, documents, pack, sample_windows
from expander_sae.lm.text import describe

TOKENIZER = tiny_tokenizer()


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    window=st.integers(2, 17),
)
def test_pack_keeps_every_token_in_order(lengths, window):
    texts = [" ".join(WORDS[(i + j) % 60] for j in range(n)) for i, n in enumerate(lengths)]
    expected = []
    for i, n in enumerate(lengths):
        expected += [(i + j) % 60 + 2 for j in range(n)] + [TOKENIZER.eos_token_id]
    whole = len(expected) // window
    if whole == 0:
        with pytest.raises(TextError, match=f"{len(expected)} tokens, .*shorter than one window of {window}"):
            list(pack(TOKENIZER, texts, window))
        return
    windows = list(pack(TOKENIZER, texts, window))
    assert all(w.shape == (window,) and w.dtype == torch.int64 for w in windows)
    assert torch.cat(windows).tolist() == expected[: whole * window]


def test_pack_refuses_bad_settings(tokenizer):
    with pytest.raises(ValueError, match="window must be at least 2"):
        pack(tokenizer, [], 1)


@pytest.mark.parametrize("count", [2, 9, 10, 11, 12, 35])
def test_splits_partition_the_documents(tmp_path, count):
    texts = [f"w{i}" for i in range(count)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    train, heldout = list(documents(path, "train")), list(documents(path, "heldout"))
    assert list(documents(path, "all")) == texts
    assert sorted(train + heldout) == sorted(texts)
    assert not set(train) & set(heldout)
    assert len(heldout) == (count + 8) // 10


def test_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("w1\n\nw2")
    write_jsonl(tmp_path / "a.jsonl", ["w3", "w4"])
    (tmp_path / "notes.md").write_text("not text of ours")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("w5")
    assert list(documents(tmp_path / "b.txt", "all")) == ["w1\n\nw2"]
    assert list(documents(tmp_path, "all")) == ["w3", "w4", "w1\n\nw2", "w5"]


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2"), ('{"body": "x"}', 'field "text"'), ('{"text": 3}', "must be a string"), ("[]", "line 2")],
)
def test_malformed_jsonl_names_the_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1"}\n' + line + "\n")
    with pytest.raises(TextError, match=message):
        list(documents(path, "all"))


def test_bad_sources(tmp_path):
    with pytest.raises(TextError, match="no text file or folder"):
        documents(tmp_path / "missing.txt")
    with pytest.raises(TextError, match=r"holds no text files \(\.txt, \.jsonl"):
        documents(tmp_path)
    (tmp_path / "a.xml").write_text("w1")
    with pytest.raises(TextError, match=r"must be a \.txt, \.jsonl, \.json, \.csv or \.parquet file"):
        documents(tmp_path / "a.xml")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TextError, match="UTF-8"):
        list(documents(tmp_path / "latin.txt", "all"))
    with pytest.raises(ValueError, match="split must be"):
        documents(tmp_path / "latin.txt", "test")  # type: ignore[arg-type]


def fake_datasets(monkeypatch, rows):
    def load_dataset(name, *, split, streaming):
        assert (name, split, streaming) == ("some/corpus", "train", True)
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_a_dataset_is_streamed_and_split(monkeypatch):
    fake_datasets(monkeypatch, [{"text": f"w{i}", "meta": {}} for i in range(30)])
    assert list(documents("some/corpus", "heldout")) == ["w1", "w11", "w21"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ConnectionError("no route"), "(?s)no route.*'embedded'"),
        ([{"content": "w1"}], 'no field "text", only content'),
    ],
)
def test_a_dataset_that_cannot_be_read(monkeypatch, rows, message):
    fake_datasets(monkeypatch, rows)
    with pytest.raises(TextError, match=message):
        list(documents("some/corpus", "all"))


def test_describe_follows_the_content(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["w1", "w2"])
    first = describe(path, "train")
    assert describe(path, "train") == first
    assert describe(path, "heldout") != first
    write_jsonl(path, ["w1", "w3"])
    assert describe(path, "train") != first
    assert describe("some/corpus", "train") == "some/corpus (train)"


def test_sample_windows_spreads_over_the_documents(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [" ".join([f"w{i}"] * 7) for i in range(40)])
    windows = sample_windows(tokenizer, path, "all", 8, 4)
    assert windows.shape == (4, 8)
    assert windows[:, 0].tolist() == [2, 10, 18, 26]  # documents 0, 8, 16 and 24 of the first 32
    assert sample_windows(tokenizer, path, "all", 8, 100).shape == (40, 8)
    with pytest.raises(ValueError, match="count"):
        sample_windows(tokenizer, path, "all", 8, 0)
