"""How cross-entropy recovered is measured: which positions are replaced, and on what windows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Replaced = Literal["all-but-first", "all"]


@dataclass(frozen=True)
class Convention:
    """One way to measure CE recovered. Rankings change with it: name the one a figure was measured by.

    Every convention averages the next-token cross-entropy over all predictions of all windows, and takes
    ``(CE_zero - CE_recon) / (CE_zero - CE_clean)`` of the means.

    Attributes:
        name: of the convention.
        summary: what it is, in one line.
        replaced: positions that are set to zero or to the reconstruction: ``"all"``, or ``"all-but-first"`` of a
            window, which is an attention sink in most models and is in no training set here.
        guarded: leave alone the positions that the SAE's training set left out too: norms above the limit, and
            special tokens if the harvest skipped them. Position 0 is decided by ``replaced`` alone.
        window, windows: how long and how many, unless told otherwise.
        spread: windows are taken evenly from the first ``spread`` times as many.
        bos: windows begin with BOS; None: as the SAE's training set was made.
        concatenate: documents run on from one window into the next; False: each window begins one; None as above.
    """

    name: str
    summary: str
    replaced: Replaced
    guarded: bool
    window: int
    windows: int
    spread: int
    bos: bool | None = None
    concatenate: bool | None = None

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
            "all positions, on the beginnings of 100 documents (the paper's author)",
            replaced="all",
            guarded=False,
            window=128,
            windows=100,
            spread=1,
            concatenate=False,
        ),
        # SAELens' evals.py with the defaults of its runner: context_size 128, prepend_bos, no tokens ignored.
        Convention(
            "saelens",
            "all positions, on windows that begin with BOS (SAELens)",
            replaced="all",
            guarded=False,
            window=128,
            windows=32,
            spread=8,
            bos=True,
            concatenate=True,
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
