"""Harvesting: the rows are the model's, and interruptions, bad requests and attention sinks are handled."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import warnings

import pytest
import torch
from support.lm import BOS, WORDS, several_streams_lm, tiny_lm, tiny_tokenizer

from expander_sae.data import ActivationStore, Manifest, StoreError
from expander_sae.files import sha256_file
from expander_sae.lm import Site, TextError, documents, harvest, harvest_many, pack, residual

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


# The norm guard


def test_the_limit_is_written_down_and_travels(lm, corpus, tmp_path):
    store = run(lm, corpus, tmp_path / "store", max_norm_multiple=3.0)
    rows, _ = expected_rows(lm, corpus)
    meta = store.manifest.meta
    assert meta.norm_median == pytest.approx(float(rows.norm(dim=1).median()), rel=1e-6)  # the corpus is < 4,096 long
    assert meta.norm_limit == 3 * meta.norm_median
    origin = store.origin()
    expected = (meta.norm_median, meta.norm_limit, 3.0)
    assert (origin["norm_median"], origin["norm_limit"], origin["max_norm_multiple"]) == expected
    assert origin["tokenizer_hash"] == lm.tokenizer_hash
    free = run(lm, corpus, tmp_path / "free", max_norm_multiple=None)
    assert (free.origin()["norm_median"], free.origin()["norm_limit"]) == (meta.norm_median, None)


def test_a_store_made_before_the_limit_was_recorded_still_gives_it(lm, corpus, tmp_path):
    store = run(lm, corpus, tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    data = json.loads(path.read_text())
    data.pop("sha256", None)
    for name in ("norm_median", "norm_limit", "weights", "tokenizer_hash", "bos", "concatenate", "skip_special"):
        del data["meta"][name]
    path.write_text(json.dumps(data))
    old = ActivationStore.open(tmp_path / "store", verify="sha256")  # its shards are still its own
    assert old.origin()["norm_limit"] == store.origin()["norm_limit"]
    assert same(run(lm, corpus, tmp_path / "store"), store)


# BOS, special tokens, one document for each window


def test_the_default_is_what_it_was(lm, corpus, tmp_path):
    """No BOS, documents end to end, special tokens kept: the fingerprint in every shard is that of before, too."""
    meta = run(lm, corpus, tmp_path / "store").manifest.meta
    assert (meta.bos, meta.concatenate, meta.skip_special) == (False, True, False)
    names = ("model", "revision", "tokenizer", "hook", "layer", "d_in", "dtype", "text", "window", "skip_positions",
             "max_norm_multiple")  # fmt: skip
    before = json.dumps({name: getattr(meta, name) for name in names}, sort_keys=True)
    assert meta.fingerprint() == hashlib.sha256(before.encode()).hexdigest()


def test_bos_where_the_tokenizer_adds_it(corpus, tmp_path):
    lm = tiny_lm(tokenizer=tiny_tokenizer(adds_bos=True))
    store = run(lm, corpus, tmp_path / "store", skip_positions=())
    assert store.origin()["bos"] is True
    assert (store.tokens(slice(None, None, WINDOW)) == BOS).all()
    windows = torch.stack(list(pack(lm.tokenizer, documents(corpus, "train"), WINDOW, bos=True)))
    torch.testing.assert_close(store.rows(slice(None)), residual(lm, windows, 1).flatten(0, 1)[:500], rtol=0, atol=1e-5)
    without = run(lm, corpus, tmp_path / "without", bos=False)
    assert BOS not in without.tokens(slice(None))
    with pytest.raises(StoreError, match="bos: True, not False"):
        run(lm, corpus, tmp_path / "store", skip_positions=(), bos=False)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()], ids=["whole", "interrupted"])
def test_special_tokens_are_left_out_and_counted(lm, corpus, tmp_path, error):
    if error:
        with Interrupt(lm, 10**9, error) as full:
            run(lm, corpus, tmp_path / "whole", skip_special=True)
        with Interrupt(lm, full.passes - 4, error), pytest.raises(KeyboardInterrupt):
            run(lm, corpus, tmp_path / "store", skip_special=True)
        assert 0 < Manifest.read(tmp_path / "store").num_rows < 500
    store = run(lm, corpus, tmp_path / "store", skip_special=True)
    rows, tokens = expected_rows(lm, corpus)
    keep = tokens != 1  # EOS
    assert torch.equal(store.tokens(slice(None)).long(), tokens[keep][:500])
    torch.testing.assert_close(store.rows(slice(None)), rows[keep][:500], rtol=0, atol=1e-5)
    last = int(torch.nonzero(keep).flatten()[499])
    counted = store.manifest.cursor["left_out_special"]
    assert counted - int((~keep[: last + 1]).sum()) in (0, 1)  # one that stands between the last row and the next
    assert counted > 3


def test_one_document_for_each_window_is_counted(lm, corpus, tmp_path):
    store = run(lm, corpus, tmp_path / "store", concatenate=False, num_tokens=900)
    lengths = [len(text.split()) for text in documents(corpus, "train")]
    fitting = [i for i, length in enumerate(lengths) if length >= WINDOW]
    assert store.tokens(slice(0, 1)).tolist() == [
        lm.tokenizer(next(itertools.islice(documents(corpus, "train"), fitting[0], None)))["input_ids"][1]
    ]
    short = store.manifest.cursor["documents_too_short"]
    assert 0 < short <= len(lengths) - len(fitting)
    assert store.origin()["concatenate"] is False


# Several sites


def test_several_sites_in_one_pass_are_each_what_they_are_alone(lm, corpus, tmp_path):
    with Interrupt(lm, 10**9, SystemExit()) as alone:
        single = run(lm, corpus, tmp_path / "single", layer=2, hook="mlp")
    with Interrupt(lm, 10**9, SystemExit()) as together:
        stores = harvest_many(
            lm, corpus, [0, 2], 500, tmp_path / "all", hooks=["mlp", "residual", "attention"], window=WINDOW,
            batch_windows=4, shard_rows=128,
        )  # fmt: skip
    assert together.passes == alone.passes
    assert {site: store.folder.name for site, store in stores.items()} == {
        Site(layer, hook): f"{hook}-{layer}" for layer in (0, 2) for hook in ("mlp", "residual", "attention")
    }
    assert same(stores[Site(2, "mlp")], single)
    assert (single.origin()["hook"], single.origin()["layer"]) == ("mlp", 2)
    assert same(stores[Site(0)], run(lm, corpus, tmp_path / "residual", layer=0))
    with pytest.raises(StoreError, match="hook: 'mlp', not 'attention'"):
        run(lm, corpus, tmp_path / "single", layer=2, hook="attention")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()], ids=["ctrl-c", "killed"])
def test_several_sites_are_each_resumed_where_they_were(corpus, tmp_path, error):
    """One has so many loud rows left out that it is behind the other, and one is there already."""
    lm = tiny_lm()
    lm.model.get_input_embeddings().weight[5:30] *= 1e4

    def many(out, **settings):
        settings = {"window": WINDOW, "batch_windows": 4, "shard_rows": 128, "max_norm_multiple": 1.05} | settings
        return harvest_many(lm, corpus, [0, 3], 400, out, **settings)

    whole = many(tmp_path / "whole")
    assert whole[Site(0)].manifest.cursor["windows"] != whole[Site(3)].manifest.cursor["windows"]
    with Interrupt(lm, 10**9, error) as full:
        many(tmp_path / "again")
    with Interrupt(lm, full.passes - 3, error), pytest.raises(type(error)):
        many(tmp_path / "cut")
    assert not all(Manifest.read(tmp_path / "cut" / str(site)).complete for site in whole)
    assert any(Manifest.read(tmp_path / "cut" / str(site)).num_rows for site in whole)
    resumed = many(tmp_path / "cut", batch_windows=3)
    for site, store in whole.items():
        torch.testing.assert_close(resumed[site].rows(slice(None)), store.rows(slice(None)), rtol=1e-5, atol=1e-3)
        assert torch.equal(resumed[site].tokens(slice(None)), store.tokens(slice(None)))
        for count in ("left_out_by_position", "left_out_by_norm"):
            assert getattr(resumed[site].manifest, count) == getattr(store.manifest, count)


def test_models_that_are_not_supported_leave_no_store(corpus, tmp_path):
    with pytest.raises(ValueError, match="Gemma 3n, are not supported"):
        run(several_streams_lm(), corpus, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_changed_text_says_what_changed_and_what_to_do(lm, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "w1 w2 w3"}\n' * 400)
    with Interrupt(lm, 10**9, SystemExit()) as full:
        run(lm, path, tmp_path / "whole")
    with Interrupt(lm, full.passes - 1, SystemExit()), pytest.raises(SystemExit):
        run(lm, path, tmp_path / "store")
    before = sha256_file(path)
    path.write_text('{"text": "w1 w2 w4"}\n' * 400)
    with pytest.raises(StoreError, match=r"text that has changed since: its SHA-256 was \w+… and is \w+….*Restore"):
        run(lm, path, tmp_path / "store")
    path.write_text('{"text": "w1 w2 w3"}\n' * 400)
    assert sha256_file(path) == before
    assert len(run(lm, path, tmp_path / "store")) == 500


def test_the_home_folder(lm, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run(lm, corpus, "~/store")
    assert (tmp_path / "store" / "manifest.json").exists()
