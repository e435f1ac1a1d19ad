"""Harvest: run a language model over text and keep its activations at one site, or several, on disk."""

from __future__ import annotations

import itertools
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

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
from expander_sae.files import human_bytes, user_path
from expander_sae.lm.embedded import Split
from expander_sae.lm.hook import capture
from expander_sae.lm.models import LanguageModel
from expander_sae.lm.norms import DEFAULT_MULTIPLE, NormGuard, check_multiple, median_norms, windows_to_calibrate
from expander_sae.lm.packing import Windows, pack, special_ids, wants_bos
from expander_sae.lm.sites import Hook, Site
from expander_sae.lm.text import TEXT_FIELD, describe, documents
from expander_sae.progress import progress


class HarvestOptions(TypedDict, total=False):
    """How a harvest reads its text and chooses its rows."""

    split: Split
    """``"train"`` (default), ``"heldout"`` or ``"all"``, see :func:`~expander_sae.lm.text.documents`."""
    text_field: str
    """The field of a record that holds the text; default ``"text"``."""
    window: int
    """Tokens a sequence; default 256."""
    batch_windows: int | None
    """Windows run at once; default None: 1,024 tokens' worth on a CPU, 16,384 on a GPU."""
    dtype: str
    """``"float32"``, ``"bfloat16"``, ``"float16"`` on disk; ``"auto"`` (default): the dtype the model runs in."""
    bos: bool | None
    """Begin every window with BOS; default None: where the tokenizer does, and for the Gemma family."""
    concatenate: bool
    """Documents end to end with EOS between them (default), or one document for each window: its beginning."""
    skip_positions: tuple[int, ...]
    """Positions of every window left out; default ``(0,)``, an attention sink: on the embedded model its norm is
    150 times the median, whatever token stands there (BOS included)."""
    skip_special: bool
    """Leave out the positions of all special tokens too (EOS between documents, BOS, …); default False."""
    max_norm_multiple: float | None
    """Leave out rows whose norm exceeds this multiple of the median norm, which is taken once, over the first 4,096
    positions read, and written down; default 10, None for no limit."""
    shard_rows: int
    """Rows in a file; default 16,384."""


def harvest(
    lm: LanguageModel,
    source: str | Path,
    layer: int,
    num_tokens: int,
    out: str | Path,
    *,
    hook: Hook = "residual",
    **options: Unpack[HarvestOptions],
) -> ActivationStore:
    """Store ``num_tokens`` rows of the activations at block ``layer`` in the folder ``out``.

    ``hook``: the block's output (``"residual"``), or its attention's or MLP's (``"attention"``, ``"mlp"``).
    ``source``: the text, see ``text.documents``. Everything else: :class:`HarvestOptions`. What is left out is
    counted in the manifest.

    The size on disk is printed, and the room for it checked, before the work starts. A harvest that was
    killed goes on where its last shard ended; after Ctrl-C nothing read is lost. A finished store of the
    same request is returned as it is. If the text ends early, the store has fewer rows and a warning says so.

    Raises ``StoreError`` if ``out`` holds another model's, layer's or text's store or one of another length,
    ``TextError`` for text shorter than one window, ``OSError`` without enough disk space, ``ValueError`` for
    a site that does not exist, a model that is not supported, or sizes out of range.
    """
    site = Site(layer, hook)
    return _harvest(lm, source, {site: user_path(out)}, num_tokens, options)[site]


def harvest_many(
    lm: LanguageModel,
    source: str | Path,
    layers: Sequence[int],
    num_tokens: int,
    out: str | Path,
    *,
    hooks: Sequence[Hook] = ("residual",),
    **options: Unpack[HarvestOptions],
) -> dict[Site, ActivationStore]:
    """As :func:`harvest`, at every hook of every layer in one pass: a store each, in ``out/residual-3`` and so on.

    Each store has its own norm limit, so that the rows of two need not be of the same tokens. Each is resumed where
    it was.
    """
    sites = [Site(layer, hook) for layer in dict.fromkeys(layers) for hook in dict.fromkeys(hooks)]
    if not sites:
        raise ValueError("name at least one layer and one hook")
    folders = {site: user_path(out) / str(site) for site in sites}
    return _harvest(lm, source, folders, num_tokens, options)


def _harvest(
    lm: LanguageModel,
    source: str | Path,
    folders: Mapping[Site, Path],
    num_tokens: int,
    options: HarvestOptions,
) -> dict[Site, ActivationStore]:
    plan = _plan(lm, source, num_tokens, options)
    metas = {site: replace(plan.meta, layer=site.layer, hook=site.hook) for site in folders}
    stores = {site: _finished(folder, metas[site], num_tokens) for site, folder in folders.items()}
    missing = [site for site, store in stores.items() if store is None]
    if missing:
        _print_size(lm, plan.meta, num_tokens, {site: folders[site] for site in missing})
        _Run(lm, source, plan, num_tokens, options).fill({site: (folders[site], metas[site]) for site in missing})
    opened = {site: store or ActivationStore.open(folders[site]) for site, store in stores.items()}
    if missing and (shortest := min(len(opened[site]) for site in missing)) < num_tokens:
        warnings.warn(f"The text {plan.meta.text} ended after {shortest:,} of {num_tokens:,} tokens.", stacklevel=3)
    return opened


@dataclass(frozen=True)
class _Plan:
    """What the sites of one harvest share. ``meta``: of any of them, with the layer and the hook left to fill in."""

    meta: StoreMeta
    per_batch: int


def _plan(lm: LanguageModel, source: str | Path, num_tokens: int, options: HarvestOptions) -> _Plan:
    window = options.get("window", 256)
    batch_windows = options.get("batch_windows")
    skip_positions = tuple(options.get("skip_positions", (0,)))
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, not {num_tokens}")
    lm.check_window(window)
    if batch_windows is not None and batch_windows < 1:
        raise ValueError(f"batch_windows must be at least 1, not {batch_windows}")
    if any(not 0 <= position < window for position in skip_positions):
        raise ValueError(f"skip_positions must lie in the window of {window} tokens, not {skip_positions}")
    if len(set(skip_positions)) >= window:
        raise ValueError("skip_positions leaves no position of the window to keep")
    bos, dtype = options.get("bos"), options.get("dtype", "auto")
    meta = StoreMeta(
        model=lm.name,
        revision=lm.revision,
        tokenizer=type(lm.tokenizer).__name__,
        hook="residual",
        layer=0,
        d_in=lm.d_model,
        dtype=str(lm.dtype).removeprefix("torch.") if dtype == "auto" else dtype,
        text=describe(source, options.get("split", "train"), text_field=options.get("text_field", TEXT_FIELD)),
        window=window,
        skip_positions=skip_positions,
        max_norm_multiple=check_multiple(options.get("max_norm_multiple", DEFAULT_MULTIPLE)),
        weights=lm.weights,
        tokenizer_hash=lm.tokenizer_hash,
        bos=wants_bos(lm) if bos is None else bos,
        concatenate=options.get("concatenate", True),
        skip_special=options.get("skip_special", False),
    )
    return _Plan(meta, batch_windows or max(1, (16384 if lm.device.type == "cuda" else 1024) // window))


def _print_size(lm: LanguageModel, meta: StoreMeta, num_tokens: int, folders: Mapping[Site, Path]) -> None:
    size = human_bytes(planned_bytes(num_tokens, meta.d_in, meta.dtype))
    for site, folder in folders.items():
        where = f"layer {site.layer}" + ("" if site.hook == "residual" else f" {site.hook}")
        print(
            f"Harvesting {num_tokens:,} tokens of {lm.name}, {where} ({meta.d_in} x {meta.dtype}): {size} in {folder}",
            file=sys.stderr,
        )


class _Run:
    """One pass over the text that fills stores."""

    def __init__(
        self, lm: LanguageModel, source: str | Path, plan: _Plan, num_tokens: int, options: HarvestOptions
    ) -> None:
        self.lm, self.meta, self.per_batch, self.num_tokens = lm, plan.meta, plan.per_batch, num_tokens
        self.shard_rows = options.get("shard_rows", 16384)
        text = documents(source, options.get("split", "train"), text_field=options.get("text_field", TEXT_FIELD))
        self.windows: Windows = pack(
            lm.tokenizer, text, plan.meta.window, bos=plan.meta.bos, concatenate=plan.meta.concatenate
        )
        self.special = special_ids(lm.tokenizer)

    def fill(self, places: Mapping[Site, tuple[Path, StoreMeta]]) -> None:
        """Append batch after batch until each store has its rows or the text ends."""
        # Before any store is made: it fails for too short a text and for models that are not supported.
        first, guards = self._guards(places)
        stores = []
        with ExitStack() as stack:
            for site, (folder, meta) in places.items():
                found = replace(meta, norm_median=guards[site].median, norm_limit=guards[site].limit)
                stores.append(_Store(self, site, folder, found))
                stack.enter_context(stores[-1].writer)
            done = sum(store.writer.num_rows for store in stores)
            if done:
                print(f"Going on after {done:,} tokens harvested before.", file=sys.stderr)
            names = ", ".join(f"layer {site.layer}" if site.hook == "residual" else str(site) for site in places)
            total = self.num_tokens * len(stores)
            advance = stack.enter_context(progress(f"Harvest {names}", total, "tokens", done=done))
            self._read(itertools.chain(first, self.windows), stores, advance)

    def _guards(
        self, places: Mapping[Site, tuple[Path, StoreMeta]]
    ) -> tuple[list[torch.Tensor], dict[Site, NormGuard]]:
        """The norm limit of each store, and the windows that were read from the text to find it."""
        known = {site: _recorded_median(folder) for site, (folder, _) in places.items()}
        unknown = [site for site, median in known.items() if median is None]
        first = list(itertools.islice(self.windows, windows_to_calibrate(self.meta.window) if unknown else 1))
        found = median_norms(self.lm, first, unknown, self._counted, self.per_batch) if unknown else {}
        for site in unknown:
            if math.isnan(found[site]):
                raise StoreError(f"the activations of {self.lm.name} at {site} hold NaN in {self.lm.dtype}")
        multiple = self.meta.max_norm_multiple
        return first, {site: NormGuard(known[site] or found[site], multiple) for site in places}

    def _read(self, windows: Iterator[torch.Tensor], stores: list[_Store], advance: Callable[[int], Any]) -> None:
        # Text is read again on resuming: it costs next to nothing.
        number = min(store.windows for store in stores)
        windows = itertools.islice(windows, number, None)
        while wanting := [store for store in stores if store.missing > 0]:
            batch = list(itertools.islice(windows, self.per_batch))
            if not batch:
                for store in wanting:
                    store.end(number)
                return
            tokens = torch.stack(batch)
            hidden = capture(self.lm, tokens, [store.site for store in wanting])
            for store in wanting:
                skip = max(store.windows - number, 0)  # what this one had before the others
                if skip < len(batch):
                    advance(store.append(hidden[store.site][skip:], tokens[skip:], number + len(batch)))
            number += len(batch)

    def at_skipped(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which positions of ``tokens`` ``(B, T)`` are left out for where they stand: bool ``(T,)``."""
        return torch.isin(torch.arange(tokens.shape[1]), torch.tensor(self.meta.skip_positions, dtype=torch.int64))

    def at_special(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which are left out as special tokens: bool ``(B, T)``."""
        nothing = torch.zeros(tokens.shape, dtype=torch.bool)
        return torch.isin(tokens, self.special) if self.meta.skip_special else nothing

    def _counted(self, tokens: torch.Tensor) -> torch.Tensor:
        return ~(self.at_skipped(tokens) | self.at_special(tokens))


class _Store:
    """The writer of one site, what it keeps of a batch, and where it goes on."""

    def __init__(self, run: _Run, site: Site, folder: Path, meta: StoreMeta) -> None:
        self.run, self.site = run, site
        self.writer = StoreWriter(folder, meta, expected_rows=run.num_tokens, shard_rows=run.shard_rows)
        self.guard = NormGuard(meta.norm_median or 0.0, meta.max_norm_multiple)
        cursor = self.writer.cursor or {}
        self.windows: int = cursor.get("windows", 0)
        self.left_out_special: int = cursor.get("left_out_special", 0)

    @property
    def missing(self) -> int:
        return self.run.num_tokens - self.writer.num_rows

    def append(self, hidden: torch.Tensor, tokens: torch.Tensor, windows: int) -> int:
        """Keep of ``hidden`` ``(B, T, m)`` what is to be kept; returns how many rows. ``windows``: read by then."""
        run, flat = self.run, hidden.flatten(0, 1)
        positions = torch.arange(tokens.shape[1]).repeat(len(tokens))
        skipped = run.at_skipped(tokens).repeat(len(tokens))
        special = run.at_special(tokens).flatten() & ~skipped
        too_large = self.guard.too_large(flat).cpu() & ~skipped & ~special
        kept = torch.nonzero(~(skipped | special | too_large)).flatten()
        end, self.windows = len(positions), windows
        if len(kept) > self.missing:  # the store ends inside this batch
            end = int(kept[self.missing])
            kept = kept[: self.missing]
        self.left_out_special += int(special[:end].sum())
        self.writer.append(
            flat[kept.to(flat.device)],
            tokens.flatten()[kept],
            positions[kept],
            cursor=self._cursor(),
            left_out_by_position=int(skipped[:end].sum()),
            left_out_by_norm=int(too_large[:end].sum()),
        )
        return len(kept)

    def end(self, windows: int) -> None:
        """Note that the text has ended."""
        self.windows = max(windows, self.windows)
        none = torch.empty(0, dtype=torch.int32)
        self.writer.append(torch.empty(0, self.writer.manifest.meta.d_in), none, none, cursor=self._cursor(ended=True))

    def _cursor(self, ended: bool = False) -> dict[str, Any]:
        """What a resumed harvest needs, and counts that the manifest has no field for."""
        packed = self.run.windows
        return {
            "windows": self.windows,
            "median_norm": self.guard.median,
            "text_ended": ended,
            "left_out_special": self.left_out_special,
            "documents": packed.documents,
            "documents_too_short": packed.too_short,
        }


def _recorded_median(folder: Path) -> float | None:
    """The median norm of the unfinished store in a folder, None if there is none."""
    return Manifest.read(folder).origin()["norm_median"] if (folder / MANIFEST).exists() else None


def _finished(out: Path, meta: StoreMeta, num_tokens: int) -> ActivationStore | None:
    """The finished store of this very request, None if there is none; ``StoreError`` for another's."""
    if not (out / MANIFEST).exists():
        return None
    manifest = Manifest.read(out)
    if differences := manifest.meta.differences(meta):
        if (changed := _changed_text(manifest.meta, meta)) is not None and len(differences) == 1:
            raise StoreError(
                f"{out} was harvested from a text that has changed since: its {changed}. Rows of the two must not "
                "stand in one store. Restore the text to go on; or delete the folder, or choose another, to harvest "
                "the new text from its beginning."
            )
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


def _changed_text(before: StoreMeta, now: StoreMeta) -> str | None:
    """``"SHA-256 was … and is …"`` if the text differs in nothing but its content."""
    parts = [re.fullmatch(r"(.*, sha256 )([0-9a-f]+)\)", meta.text) for meta in (before, now)]
    if parts[0] is None or parts[1] is None or parts[0][1] != parts[1][1] or before.text == now.text:
        return None
    return f"SHA-256 was {parts[0][2]}… and is {parts[1][2]}…"
