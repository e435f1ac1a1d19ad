"""Harvest: run a language model over text and keep its residual stream at one layer on disk."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from expander_sae.data import (
    MANIFEST,
    ActivationStore,
    Manifest,
    StoreError,
    StoreMeta,
    StoreWriter,
    planned_bytes,
)
from expander_sae.files import human_bytes
from expander_sae.lm.embedded import Split
from expander_sae.lm.hook import residual
from expander_sae.lm.models import LanguageModel
from expander_sae.lm.text import describe, documents, pack
from expander_sae.progress import progress

_CALIBRATION_TOKENS = 4096  # positions whose median norm sets the limit of the norm guard


def harvest(
    lm: LanguageModel,
    source: str | Path,
    layer: int,
    num_tokens: int,
    out: str | Path,
    *,
    split: Split = "train",
    window: int = 256,
    batch_windows: int | None = None,
    dtype: str = "auto",
    max_norm_multiple: float | None = 10.0,
    skip_positions: tuple[int, ...] = (0,),
    shard_rows: int = 16384,
) -> ActivationStore:
    """Store ``num_tokens`` rows of the residual stream after block ``layer`` in the folder ``out``.

    ``source``, ``split``: the text, see ``text.documents``; ``window``: tokens a sequence.
    ``batch_windows``: windows run at once; None: 1,024 tokens' worth on a CPU, 16,384 on a GPU.
    ``dtype``: ``"float32"``, ``"bfloat16"``, ``"float16"`` on disk; ``"auto"``: the dtype the model runs in.
    ``skip_positions``: positions of every window left out (0 is an attention sink: on the embedded model its
    norm is 150 times the median). ``max_norm_multiple``: rows whose norm exceeds this multiple of the median
    norm are left out too; the median is taken over the first 4,096 positions read and then held, so that a
    resumed harvest applies the same limit. Both are counted in the manifest.

    The size on disk is printed, and the room for it checked, before the work starts. A harvest that was
    killed goes on where its last shard ended; after Ctrl-C nothing read is lost. A finished store of the
    same request is returned as it is. If the text ends early, the store has fewer rows and a warning says so.

    Raises ``StoreError`` if ``out`` holds another model's, layer's or text's store or one of another length,
    ``TextError`` for text shorter than one window, ``OSError`` without enough disk space, ``ValueError`` for
    a layer that does not exist or sizes out of range.
    """
    lm.check_layer(layer)
    _check_sizes(lm, num_tokens, window, batch_windows, max_norm_multiple, skip_positions)
    meta = StoreMeta(
        model=lm.name,
        revision=lm.revision,
        tokenizer=type(lm.tokenizer).__name__,
        hook="residual",
        layer=layer,
        d_in=lm.d_model,
        dtype=str(lm.dtype).removeprefix("torch.") if dtype == "auto" else dtype,
        text=describe(source, split),
        window=window,
        skip_positions=skip_positions,
        max_norm_multiple=max_norm_multiple,
    )
    out = Path(out)
    if (finished := _finished(out, meta, num_tokens)) is not None:
        return finished
    size = planned_bytes(num_tokens, meta.d_in, meta.dtype)
    print(
        f"Harvesting {num_tokens:,} tokens of {lm.name}, layer {layer} ({meta.d_in} x {meta.dtype}): "
        f"{human_bytes(size)} in {out}",
        file=sys.stderr,
    )
    windows = pack(lm.tokenizer, documents(source, split), window)
    windows = itertools.chain([next(windows)], windows)  # too short a text fails before the store is made
    per_batch = batch_windows or max(1, (16384 if lm.device.type == "cuda" else 1024) // window)
    writer = StoreWriter(out, meta, expected_rows=num_tokens, shard_rows=shard_rows)
    if writer.num_rows:
        print(f"Going on after {writer.num_rows:,} tokens harvested before.", file=sys.stderr)
    with writer, progress(f"Harvest layer {layer}", num_tokens, "tokens", done=writer.num_rows) as advance:
        _run(lm, writer, windows, num_tokens, per_batch, advance)
    store = ActivationStore.open(out)
    if len(store) < num_tokens:
        warnings.warn(f"The text {meta.text} ended after {len(store):,} of {num_tokens:,} tokens.", stacklevel=2)
    return store


def _run(
    lm: LanguageModel,
    writer: StoreWriter,
    windows: Iterator[torch.Tensor],
    num_tokens: int,
    per_batch: int,
    advance: Any,
) -> None:
    """Append batch after batch until ``num_tokens`` rows are stored or the text ends."""
    meta = writer.manifest.meta
    done, median = (writer.cursor["windows"], writer.cursor["median_norm"]) if writer.cursor else (0, None)
    windows = itertools.islice(windows, done, None)  # text is read again on resuming: it costs next to nothing
    if median is None:
        first = list(itertools.islice(windows, -(-_CALIBRATION_TOKENS // meta.window)))
        median = _median_norm(lm, first, meta, per_batch)
        windows = itertools.chain(first, windows)
    limit = float("inf") if meta.max_norm_multiple is None else meta.max_norm_multiple * median
    while (missing := num_tokens - writer.num_rows) > 0:
        batch = list(itertools.islice(windows, per_batch))
        done += len(batch)
        cursor = {"windows": done, "median_norm": median, "text_ended": not batch}
        if not batch:
            none = torch.empty(0, dtype=torch.int32)
            writer.append(torch.empty(0, meta.d_in), none, none, cursor=cursor)
            return
        tokens = torch.stack(batch)
        hidden = residual(lm, tokens, meta.layer).flatten(0, 1)
        positions = torch.arange(meta.window).repeat(len(batch))
        at_skipped = torch.isin(positions, torch.tensor(meta.skip_positions, dtype=torch.int64))
        too_large = ~at_skipped & (hidden.float().norm(dim=1) > limit).cpu()
        kept = torch.nonzero(~at_skipped & ~too_large).flatten()
        end = len(positions)
        if len(kept) > missing:  # the store ends inside this batch
            kept, end = kept[:missing], int(kept[missing])
        writer.append(
            hidden[kept.to(hidden.device)],
            tokens.flatten()[kept],
            positions[kept],
            cursor=cursor,
            left_out_by_position=int(at_skipped[:end].sum()),
            left_out_by_norm=int(too_large[:end].sum()),
        )
        advance(len(kept))


def _median_norm(lm: LanguageModel, windows: list[torch.Tensor], meta: StoreMeta, per_batch: int) -> float:
    keep = torch.ones(meta.window, dtype=torch.bool)
    keep[list(meta.skip_positions)] = False
    norms = []
    for start in range(0, len(windows), per_batch):
        tokens = torch.stack(windows[start : start + per_batch])
        norms.append(residual(lm, tokens, meta.layer).float().norm(dim=2).cpu()[:, keep].flatten())
    return float(torch.cat(norms).median())


def _finished(out: Path, meta: StoreMeta, num_tokens: int) -> ActivationStore | None:
    """The finished store of this very request, None if there is none; ``StoreError`` for another's."""
    if not (out / MANIFEST).exists():
        return None
    manifest = Manifest.read(out)
    if differences := manifest.meta.differences(meta):
        raise StoreError(f"{out} holds another harvest ({'; '.join(differences)}). Choose another folder or delete it.")
    if not manifest.complete:
        if manifest.num_rows > num_tokens:
            raise StoreError(f"{out} already holds {manifest.num_rows:,} tokens, more than {num_tokens:,}.")
        return None
    ended = bool(manifest.cursor and manifest.cursor.get("text_ended"))
    if manifest.num_rows == num_tokens or (ended and manifest.num_rows < num_tokens):
        return ActivationStore.open(out)
    raise StoreError(
        f"{out} is a finished store of {manifest.num_rows:,} tokens, not {num_tokens:,}. "
        "Ask for as many, choose another folder, or delete it."
    )


def _check_sizes(
    lm: LanguageModel,
    num_tokens: int,
    window: int,
    batch_windows: int | None,
    max_norm_multiple: float | None,
    skip_positions: tuple[int, ...],
) -> None:
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, not {num_tokens}")
    longest = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if window < 2 or (longest and window > longest):
        raise ValueError(f"window must be from 2 to the model's context of {longest} tokens, not {window}")
    if batch_windows is not None and batch_windows < 1:
        raise ValueError(f"batch_windows must be at least 1, not {batch_windows}")
    if max_norm_multiple is not None and not max_norm_multiple > 1:
        raise ValueError(f"max_norm_multiple must be above 1 (or None for no limit), not {max_norm_multiple}")
    if any(not 0 <= position < window for position in skip_positions):
        raise ValueError(f"skip_positions must lie in the window of {window} tokens, not {skip_positions}")
    if len(set(skip_positions)) >= window:
        raise ValueError("skip_positions leaves no position of the window to keep")
