"""BOS, special tokens, documents end to end or one for each window."""

from __future__ import annotations

import pytest
import torch
from support.lm import BOS, WORDS, tiny_lm, tiny_tokenizer

from expander_sae.lm import TextError, pack, special_ids, structural_ids, wants_bos

TEXTS = [" ".join(WORDS[:7]), "w10 w11", " ".join(WORDS[20:32])]
IDS = [[i + 2 for i in range(7)], [12, 13], [i + 2 for i in range(20, 32)]]


def test_bos_stands_before_every_window_and_nothing_else_changes() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    plain = list(pack(tokenizer, TEXTS, 5))
    begun = list(pack(tokenizer, TEXTS, 6, bos=True))
    assert [window.tolist() for window in begun] == [[BOS, *window.tolist()] for window in plain]
    assert torch.cat(plain).tolist() == [*IDS[0], 1, *IDS[1], 1, *IDS[2]][:20]


@pytest.mark.parametrize("bos", [False, True])
def test_one_document_for_each_window(bos: bool) -> None:
    packed = pack(tiny_tokenizer(bos=True), TEXTS, 6, bos=bos, concatenate=False)
    begin = [BOS] if bos else []
    assert [window.tolist() for window in packed] == [(begin + ids)[:6] for ids in (IDS[0], IDS[2])]
    assert (packed.documents, packed.too_short) == (3, 1)
    with pytest.raises(TextError, match="None of the 3 documents fills a window of 40"):
        list(pack(tiny_tokenizer(bos=True), TEXTS, 40, concatenate=False))


def test_a_tokenizer_without_eos_leaves_nothing_between() -> None:
    tokenizer = tiny_tokenizer(eos_token=None)
    assert tokenizer.eos_token_id is None
    packed = pack(tokenizer, TEXTS, 3)
    assert torch.cat(list(packed)).tolist() == [*IDS[0], *IDS[1], *IDS[2]]
    assert packed.documents == 3


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (6, [[BOS, 2, 3, 4, 5, 6], [BOS, 7, 8, BOS, 12, 13], [BOS, *IDS[2][:5]], [BOS, *IDS[2][5:10]]]),
        (9, [[BOS, *IDS[0], BOS], [BOS, 12, 13, BOS, *IDS[2][:5]]]),
    ],
)
def test_bos_between_documents(window: int, expected: list[list[int]]) -> None:
    """As SAELens 6.54 packs them (worked by hand from its `_add_tokens_to_batch`): never two in a row."""
    texts = [TEXTS[0], "", *TEXTS[1:]]
    packed = pack(tiny_tokenizer(bos=True), texts, window, bos=True, separator="bos")
    assert [found.tolist() for found in packed] == expected
    bare = pack(tiny_tokenizer(), TEXTS, 3, separator="bos")
    assert torch.cat(list(bare)).tolist() == [*IDS[0], *IDS[1], *IDS[2]]
    with pytest.raises(ValueError, match="separator must be 'eos' or 'bos', got 'sep'"):
        pack(tiny_tokenizer(), TEXTS, 3, separator="sep")  # type: ignore[arg-type]


def test_which_models_get_bos() -> None:
    assert not wants_bos(tiny_lm())  # no BOS at all
    assert not wants_bos(tiny_lm(tokenizer=tiny_tokenizer(bos=True)))  # has one, as GPT-2, and does not use it
    assert wants_bos(tiny_lm(tokenizer=tiny_tokenizer(adds_bos=True)))
    assert wants_bos(tiny_lm("gemma2", tokenizer=tiny_tokenizer(bos=True)))
    assert not wants_bos(tiny_lm("gemma2"))


def test_special_tokens() -> None:
    assert special_ids(tiny_tokenizer(bos=True)).tolist() == [0, 1, BOS]
    assert special_ids(None).tolist() == []
    chat = tiny_tokenizer(bos=True, additional_special_tokens=["w3"])
    assert special_ids(chat).tolist() == [0, 1, 5, BOS]
    assert structural_ids(chat).tolist() == [1, BOS]  # neither the unknown token nor that of a chat
    assert structural_ids(None).tolist() == []


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="no BOS token"):
        pack(tiny_tokenizer(), TEXTS, 4, bos=True)
    with pytest.raises(ValueError, match="has no tokenizer"):
        pack(None, TEXTS, 4)
