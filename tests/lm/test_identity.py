"""Which model it is: commits from a real Hub cache, fingerprints of weights and tokenizers, what differs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.lm import VOCAB, WORDS, HubCache, tiny_lm, tiny_tokenizer

from expander_sae.data import StoreError
from expander_sae.lm import LanguageModel, harvest, load_model, mismatches, residual


def load(name: str | Path, **options) -> LanguageModel:
    return load_model(name, dtype="float32", device="cpu", **options)


def test_a_hub_model_is_known_by_its_commit(hub: HubCache, tokens: torch.Tensor) -> None:
    old = hub.commit(tiny_lm(seed=1), "step1", "v1.0")
    new = hub.commit(tiny_lm(seed=2), "main")
    assert old != new
    assert load("owner/model").revision == new
    assert torch.equal(residual(load("owner/model"), tokens, 1), residual(tiny_lm(seed=2), tokens, 1))
    for revision in ("step1", "v1.0", old):
        loaded = load("owner/model", revision=revision)
        assert (loaded.name, loaded.revision) == ("owner/model", old)
        assert torch.equal(residual(loaded, tokens, 1), residual(tiny_lm(seed=1), tokens, 1))


def test_a_branch_that_moves_is_another_model(hub: HubCache) -> None:
    first = hub.commit(tiny_lm(seed=1), "main")
    before = load("owner/model")
    second = hub.commit(tiny_lm(seed=2), "main")
    after = load("owner/model")
    assert (before.revision, after.revision) == (first, second)
    assert before.weights != after.weights


def test_a_harvest_does_not_go_on_with_a_model_that_moved(hub: HubCache, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "{" ".join(WORDS[i:] + WORDS[:i])}"}}\n' for i in range(40)))
    first = hub.commit(tiny_lm(seed=1), "main")
    lm = load("owner/model")
    passes = 0

    def kill(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 95:  # 69 find the norm limit, 36 harvest
            raise SystemExit

    def run(lm: LanguageModel) -> None:
        harvest(lm, text, 1, 1000, tmp_path / "acts", window=8, batch_windows=4, shard_rows=50)

    handle = lm.blocks[0].register_forward_pre_hook(kill)
    with pytest.raises(SystemExit):
        run(lm)
    handle.remove()
    second = hub.commit(tiny_lm(seed=2), "main")
    with pytest.raises(StoreError, match=f"revision: '{first}', not '{second}'"):
        run(load("owner/model"))
    run(load("owner/model", revision=first))  # the right one goes on
    # Another commit with the same weights is the same model.
    shutil.copytree(hub.folder / "snapshots" / first, hub.folder / "snapshots" / ("a" * 40), symlinks=True)
    hub.point("main", "a" * 40)
    run(load("owner/model"))


def test_a_local_copy_of_a_hub_model_is_recognised(hub: HubCache, tmp_path: Path) -> None:
    commit = hub.commit(tiny_lm(seed=1), "main")
    shutil.copytree(hub.folder / "snapshots" / commit, tmp_path / "copy")
    origin = {"model": "owner/model", "revision": commit, "weights": load("owner/model").weights}
    assert mismatches(origin, load(tmp_path / "copy"), 1, "residual") == []
    tiny_lm(seed=2).model.save_pretrained(tmp_path / "copy")
    (line,) = mismatches(origin, load(tmp_path / "copy"), 1, "residual")
    assert line.startswith(f"weights: trained on {commit} of owner/model, this is weights-")


def test_a_change_anywhere_in_the_weights_is_seen(tmp_path: Path) -> None:
    from expander_sae.lm.identity import weights_fingerprint

    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(9 * 2**20))  # past what is read whole
    before = weights_fingerprint(tmp_path)
    assert weights_fingerprint(tmp_path) == before
    seen = 0
    for place in range(0, 9 * 2**20, 2**17):  # training changes far longer stretches
        content = bytearray(9 * 2**20)
        content[place : place + 2**17] = b"x" * 2**17
        path.write_bytes(content)
        seen += weights_fingerprint(tmp_path) != before
    assert seen == 72
    (tmp_path / "model.safetensors").unlink()
    assert weights_fingerprint(tmp_path) is None


def test_tokenizers_are_told_apart(lm: LanguageModel) -> None:
    hashes = {
        tiny_lm(tokenizer=tokenizer).tokenizer_hash
        for tokenizer in (tiny_tokenizer(), tiny_tokenizer(bos=True), tiny_tokenizer(eos_token="w1"))
    }
    assert len(hashes) == 3
    assert tiny_lm(seed=5).tokenizer_hash == lm.tokenizer_hash
    swapped = tiny_tokenizer()
    swapped.get_vocab = lambda: {f"w{i}": VOCAB - i for i in range(60)}  # same words, other numbers
    assert tiny_lm(tokenizer=swapped).tokenizer_hash not in hashes
    assert LanguageModel(lm.model, None, "bare").tokenizer_hash is None


def test_what_differs_is_named(lm: LanguageModel) -> None:
    origin = {"model": "tiny-llama", "revision": None, "layer": 1, "hook": "residual"}
    assert mismatches(origin, lm, 1, "residual") == []
    assert mismatches({}, lm, 3, "mlp") == []
    assert mismatches(origin | {"tokenizer_hash": lm.tokenizer_hash}, lm, 1, "residual") == []
    found = mismatches(origin | {"model": "other", "tokenizer_hash": "x"}, lm, 2, "mlp")
    assert [line.split(":")[0] for line in found] == ["model", "tokenizer", "layer", "hook"]
    assert found[2:] == ["layer: trained on 1, this is 2", "hook: trained on 'residual', this is 'mlp'"]
