"""Harvesting: the rows are the model's, and interruptions, bad requests and attention sinks are handled."""

from __future__ import annotations

import json
import random
import warnings

import pytest
import torch
from support.lm import WORDS, tiny_lm

from expander_sae.data import ActivationStore, Manifest, StoreError
from expander_sae.lm import TextError, documents, harvest, pack, residual

WINDOW = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    lines = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(5, 60)))} for _ in range(120)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(lm, corpus, out, num_tokens=500, layer=1, **settings):
    settings = {"window": WINDOW, "batch_windows": 4, "shard_rows": 128} | settings
    return harvest(lm, corpus, layer, num_tokens, out, **settings)


def expected_rows(lm, corpus, layer=1):
    windows = torch.stack(list(pack(lm.tokenizer, documents(corpus, "train"), WINDOW)))
    hidden = residual(lm, windows, layer)
    return hidden[:, 1:].flatten(0, 1), windows[:, 1:].flatten()


def same(a: ActivationStore, b: ActivationStore) -> bool:
    return all(
        torch.equal(getattr(a, f)(slice(None)), getattr(b, f)(slice(None))) for f in ("rows", "tokens", "positions")
    )


def test_rows_are_the_residuals_of_the_packed_text(lm, corpus, tmp_path, capsys):
    store = run(lm, corpus, tmp_path / "store")
    rows, tokens = expected_rows(lm, corpus)
    assert len(store) == 500
    assert store.dtype == torch.float32
    torch.testing.assert_close(store.rows(slice(None)), rows[:500], rtol=0, atol=1e-5)
    assert torch.equal(store.tokens(slice(None)).long(), tokens[:500])
    assert torch.equal(store.positions(slice(None)).long(), torch.arange(1, WINDOW).repeat(34)[:500])
    assert store.manifest.left_out_by_position == 34  # 33 whole windows and one begun
    assert store.manifest.left_out_by_norm == 0
    assert len(store.manifest.shards) > 2
    said = capsys.readouterr().err
    assert "500 tokens of tiny-llama, layer 1 (32 x float32): 66.4 KiB" in said


def test_a_finished_store_is_returned_without_work(lm, corpus, tmp_path, monkeypatch):
    first = run(lm, corpus, tmp_path / "store")
    monkeypatch.setattr(type(lm.model), "forward", None)  # any forward pass would fail
    assert same(run(lm, corpus, tmp_path / "store"), first)


class Interrupt:
    """Makes the language model fail with ``error`` at its ``after``-th forward pass; counts the passes."""

    def __init__(self, lm, after, error):
        self.lm, self.after, self.error, self.passes = lm, after, error, 0

    def __enter__(self):
        def count(*_):
            self.passes += 1
            if self.passes == self.after:
                raise self.error

        self.handle = self.lm.blocks[0].register_forward_pre_hook(count)
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()], ids=["ctrl-c", "killed"])
@pytest.mark.parametrize("batch", [4, 6, 9])
def test_an_interrupted_harvest_goes_on_where_it_was(lm, corpus, tmp_path, error, batch):
    """Of the harvest's 9 batches of 60 rows, 3 fill a shard; the last stores 20 rows."""
    with Interrupt(lm, 10**9, error) as full:
        whole = run(lm, corpus, tmp_path / "whole")
    with Interrupt(lm, full.passes - 9 + batch, error), pytest.raises(type(error)):
        run(lm, corpus, tmp_path / "store")
    done = Manifest.read(tmp_path / "store")
    assert not done.complete
    rows = (batch - 1) * 60
    assert done.num_rows == (rows if isinstance(error, KeyboardInterrupt) else rows // 180 * 180)
    with pytest.raises(StoreError, match="unfinished"):
        ActivationStore.open(tmp_path / "store")
    stamps = {s.file: (tmp_path / "store" / s.file).stat().st_mtime_ns for s in done.shards}
    with Interrupt(lm, 10**9, error) as rest:
        resumed = run(lm, corpus, tmp_path / "store")
    assert same(resumed, whole)
    assert {name: (tmp_path / "store" / name).stat().st_mtime_ns for name in stamps} == stamps
    assert rest.passes == -(-(500 - done.num_rows) // (4 * (WINDOW - 1)))
    assert resumed.manifest.left_out_by_position == whole.manifest.left_out_by_position


def test_large_norms_are_left_out_and_counted(corpus, tmp_path):
    lm = tiny_lm()
    loud = 7  # one token whose embedding is enormous
    lm.model.get_input_embeddings().weight[loud] *= 1e4
    store = run(lm, corpus, tmp_path / "store", layer=0)
    rows, tokens = expected_rows(lm, corpus, layer=0)
    keep = rows.norm(dim=1) < 10 * rows.norm(dim=1).median()
    assert not keep.all()
    assert (tokens[~keep] == loud).all()
    torch.testing.assert_close(store.rows(slice(None)), rows[keep][:500], rtol=0, atol=1e-4)
    last = int(torch.nonzero(keep).flatten()[499])
    assert abs(store.manifest.left_out_by_norm - int((~keep[: last + 1]).sum())) <= 1
    strict = run(lm, corpus, tmp_path / "strict", layer=0, max_norm_multiple=1.1)
    within = rows.norm(dim=1) <= 1.1 * rows.norm(dim=1).median()  # the calibration reads all of this corpus
    torch.testing.assert_close(strict.rows(slice(None)), rows[within][:500], rtol=0, atol=1e-4)
    unguarded = run(lm, corpus, tmp_path / "all", layer=0, max_norm_multiple=None)
    torch.testing.assert_close(unguarded.rows(slice(None)), rows[:500], rtol=0, atol=1e-4)


def test_other_skipped_positions(lm, corpus, tmp_path):
    store = run(lm, corpus, tmp_path / "store", skip_positions=(0, 5))
    assert set(store.positions(slice(None)).tolist()) == set(range(WINDOW)) - {0, 5}
    everything = run(lm, corpus, tmp_path / "all", skip_positions=())
    assert everything.positions(slice(0, WINDOW)).tolist() == list(range(WINDOW))


def test_heldout_rows_share_no_document(lm, corpus, tmp_path):
    store = run(lm, corpus, tmp_path / "store", split="heldout", num_tokens=100)
    windows = torch.stack(list(pack(lm.tokenizer, documents(corpus, "heldout"), WINDOW)))
    assert torch.equal(store.tokens(slice(None)).long(), windows[:, 1:].flatten()[:100])


def test_text_that_ends_early_warns_and_is_finished(lm, corpus, tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="ended after .* of 10,000,000"):
        store = run(lm, corpus, tmp_path / "store", num_tokens=10_000_000, dtype="bfloat16")
    assert len(store) == len(expected_rows(lm, corpus)[0])
    monkeypatch.setattr(type(lm.model), "forward", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = run(lm, corpus, tmp_path / "store", num_tokens=10_000_000, dtype="bfloat16")
    assert same(again, store)


def test_another_request_in_the_same_folder(lm, corpus, tmp_path):
    run(lm, corpus, tmp_path / "store")
    for settings, field in [
        ({"layer": 2}, "layer: 1, not 2"),
        ({"window": 8}, "window: 16, not 8"),
        ({"dtype": "bfloat16"}, "dtype: 'float32', not 'bfloat16'"),
        ({"split": "heldout"}, "text: "),
    ]:
        with pytest.raises(StoreError, match=field):
            run(lm, corpus, tmp_path / "store", **settings)
    with pytest.raises(StoreError, match="model: 'tiny-llama', not 'tiny-gpt2'"):
        run(tiny_lm("gpt2"), corpus, tmp_path / "store")
    with pytest.raises(StoreError, match="finished store of 500 tokens, not 400"):
        run(lm, corpus, tmp_path / "store", num_tokens=400)


def test_text_shorter_than_a_window_leaves_no_store(lm, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("w1 w2 w3")
    with pytest.raises(TextError, match="4 tokens, which is shorter than one window of 16"):
        run(lm, path, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_no_disk_space(lm, corpus, tmp_path):
    with pytest.raises(OSError, match="free"):
        run(lm, corpus, tmp_path / "store", num_tokens=10**15)
    assert not (tmp_path / "store").exists()


def test_nan_activations_are_refused(corpus, tmp_path):
    lm = tiny_lm()
    lm.model.get_input_embeddings().weight[9] = float("nan")
    with pytest.raises(StoreError, match="NaN"):
        run(lm, corpus, tmp_path / "store")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 4}, "from 0 to 3"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"window": 1}, "window"),
        ({"window": 65}, "context of 64"),
        ({"batch_windows": 0}, "batch_windows"),
        ({"max_norm_multiple": 0.5}, "max_norm_multiple"),
        ({"skip_positions": (16,)}, "skip_positions"),
        ({"skip_positions": tuple(range(16))}, "leaves no position"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_bad_settings(lm, corpus, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(lm, corpus, tmp_path / "store", **settings)
    assert not (tmp_path / "store").exists()
