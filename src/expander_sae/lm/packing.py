"""Documents as windows of token ids: BOS or not, end to end or one document for each window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from expander_sae.lm.models import LanguageModel
from expander_sae.lm.readers import TextError

Separator = Literal["eos", "bos"]
"""What stands between two documents of one window: EOS after the first, or BOS before the second."""

_NEEDS_BOS = ("gemma",)  # families that are broken without it, whatever their tokenizer's settings say


def wants_bos(lm: LanguageModel) -> bool:
    """Whether windows for this model begin with BOS unless told otherwise.

    They do where its tokenizer puts BOS before a text by itself (Llama, Gemma, Mistral), and for models of the Gemma
    family; not where the tokenizer does not (Pythia, GPT-2, Qwen, SmolLM2).
    """
    bos = getattr(lm.tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    if lm.model.config.model_type.startswith(_NEEDS_BOS):
        return True
    return list(lm.tokenizer("a")["input_ids"])[:1] == [bos]


def special_ids(tokenizer: Any) -> Tensor:
    """Ids of all the tokenizer's special tokens, int64 ``(s,)``."""
    return torch.tensor(sorted(getattr(tokenizer, "all_special_ids", [])), dtype=torch.int64)


def structural_ids(tokenizer: Any) -> Tensor:
    """Ids of BOS, EOS, padding and separator as far as the tokenizer has them, int64 ``(s,)``: no chat tokens."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
    found = {number for name in names if (number := getattr(tokenizer, name, None)) is not None}
    return torch.tensor(sorted(found), dtype=torch.int64)


def pack(
    tokenizer: Any,
    documents: Iterable[str],
    window: int,
    *,
    bos: bool = False,
    concatenate: bool = True,
    separator: Separator = "eos",
) -> Windows:
    """Windows of token ids, int64 ``(window,)``: the documents end to end, each followed by EOS.

    Documents run on from one window into the next; what is left at the end and fills no window is dropped. ``bos``:
    each window begins with BOS, and holds one token of the text less. ``concatenate=False``: each window is the
    beginning of one document, without EOS; shorter documents are left out and counted. ``separator="bos"``: BOS stands
    before every document but one that begins a window, and no EOS after it. A tokenizer without that token leaves
    nothing between documents.

    Raises ``TextError`` at the end if the text did not fill one window, ``ValueError`` for a window below 2, no
    tokenizer, or ``bos`` with a tokenizer that has none.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, not {window}")
    if tokenizer is None:
        raise ValueError("the language model has no tokenizer to read text with: load it with tokenizer=")
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no BOS token to begin windows with: leave bos out, or set it")
    if separator not in ("eos", "bos"):
        raise ValueError(f"separator must be 'eos' or 'bos', got {separator!r}")
    return Windows(tokenizer, documents, window, [tokenizer.bos_token_id] if bos else [], concatenate, separator)


class Windows(Iterator[Tensor]):
    """What :func:`pack` gives: windows, and how many documents went into them.

    Attributes:
        documents: read so far.
        too_short: of those, left out because they fill no window.
    """

    def __init__(
        self,
        tokenizer: Any,
        documents: Iterable[str],
        window: int,
        begin: list[int],
        concatenate: bool,
        separator: Separator,
    ) -> None:
        self.documents = self.too_short = 0
        self._begin, self._room, self._window = begin, window - len(begin), window
        # verbose=False: documents may be longer than the model's context, windows are not
        pieces = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in documents)
        self._windows = self._end_to_end(pieces, tokenizer, separator) if concatenate else self._one_each(pieces)

    def __next__(self) -> Tensor:
        return next(self._windows)

    def _end_to_end(self, pieces: Iterable[list[int]], tokenizer: Any, separator: Separator) -> Iterator[Tensor]:
        token = tokenizer.eos_token_id if separator == "eos" else tokenizer.bos_token_id
        between = [] if token is None else [token]
        waiting: list[int] = []
        full = False
        for piece in pieces:
            self.documents += 1
            if separator == "eos":
                waiting += [*piece, *between]
            elif piece:
                waiting += [*between, *piece] if waiting else piece
            whole = len(waiting) // self._room * self._room
            for start in range(0, whole, self._room):
                full = True
                yield self._of(waiting[start : start + self._room])
            del waiting[:whole]
        if not full:
            raise TextError(
                f"The text has {len(waiting)} tokens, which is shorter than one window of {self._window}. "
                "Give more text or a smaller window."
            )

    def _one_each(self, pieces: Iterable[list[int]]) -> Iterator[Tensor]:
        for piece in pieces:
            self.documents += 1
            if len(piece) < self._room:
                self.too_short += 1
            else:
                yield self._of(piece[: self._room])
        if self.documents == self.too_short:
            raise TextError(
                f"None of the {self.documents} documents fills a window of {self._window} tokens. Give longer "
                "documents or a smaller window, or concatenate them."
            )

    def _of(self, tokens: list[int]) -> Tensor:
        return torch.tensor([*self._begin, *tokens], dtype=torch.int64)
