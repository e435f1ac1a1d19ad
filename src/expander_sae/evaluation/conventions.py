"""How cross-entropy recovered is measured: which positions are replaced, and on what windows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from expander_sae.lm import Separator

Replaced = Literal["all-but-first", "all"]


@dataclass(frozen=True)
class Convention:
    """One way to measure CE recovered. Rankings change with it: name the one a figure was measured by.

    Every convention averages the next-token cross-entropy over the predictions of all windows, and takes
    ``(CE_zero - CE_recon) / (CE_zero - CE_clean)`` of the means.

    Attributes:
        name: of the convention.
        summary: what it is, in one line.
        replaced: positions that are set to zero or to the reconstruction: ``"all"``, or ``"all-but-first"`` of a
            window, which is an attention sink in most models and is in no training set here.
        guarded: leave alone the positions that the SAE's training set left out too: norms above the limit, and
            special tokens if the harvest skipped them. Position 0 is decided by ``replaced`` alone.
        special_excluded: tokens of the tokenizer's own (BOS, EOS, padding, separator) keep their activations when the
            others are reconstructed, though not when they are set to zero; predictions made at them are not counted.
        window, windows: how long and how many, unless told otherwise.
        spread: windows are taken evenly from the first ``spread`` times as many.
        bos: windows begin with BOS; None: as the SAE's training set was made.
        concatenate: documents run on from one window into the next; False: each window begins one, and documents that
            fill none are left out; None as above.
        separator: what stands between documents then.
    """

    name: str
    summary: str
    replaced: Replaced
    guarded: bool
    window: int
    windows: int
    spread: int
    special_excluded: bool = False
    bos: bool | None = None
    concatenate: bool | None = None
    separator: Separator = "eos"

    def with_replaced(self, replaced: Replaced | None) -> Convention:
        """The same with other positions replaced; the name says so.

        Raises:
            ValueError: unknown choice.
        """
        if replaced not in (None, "all-but-first", "all"):
            raise ValueError(f"replaced must be 'all-but-first' or 'all', got {replaced!r}")
        if replaced in (None, self.replaced):
            return self
        return replace(self, replaced=replaced, name=f"{self.name}, replaced {replaced}")


CONVENTIONS: dict[str, Convention] = {
    convention.name: convention
    for convention in (
        Convention(
            "ours",
            "all positions but the first of a window, and but those the training set left out",
            replaced="all-but-first",
            guarded=True,
            window=256,
            windows=32,
            spread=8,
        ),
        # The author's experiments/ce_loss_sweep.py: N_CE_SEQUENCES = 100 texts, each cut to 128 tokens as the tokenizer
        # gives them, hooks on the whole output. He also uses texts shorter than 128 tokens; here these are left out.
        Convention(
            "paper",
            "all positions, on the beginnings of 100 documents (the paper's author); documents shorter than a window "
            "are left out, which he uses too",
            replaced="all",
            guarded=False,
            window=128,
            windows=100,
            spread=1,
            concatenate=False,
        ),
        # SAELens 6.54, `python -m sae_lens.evals`: context 128, 10 batches of 16 prompts, `prepend_bos`, documents
        # separated by BOS, and run_evals(exclude_special_tokens=True). Its training runner excludes none by default.
        Convention(
            "saelens",
            "all positions, special tokens zeroed but neither reconstructed nor predicted from, on windows that begin "
            "with BOS (SAELens 6.54)",
            replaced="all",
            guarded=False,
            window=128,
            windows=160,
            spread=1,
            special_excluded=True,
            bos=True,
            concatenate=True,
            separator="bos",
        ),
    )
}


def convention_named(name: str | Convention) -> Convention:
    """The convention of that name, or the one given. ``ValueError`` with the choices otherwise."""
    if isinstance(name, Convention):
        return name
    if name not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {name!r}")
    return CONVENTIONS[name]
