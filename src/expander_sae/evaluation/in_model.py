"""An SAE inside its language model: cross-entropy with the activations at its site replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expander_sae.evaluation.conventions import Convention, Replaced, convention_named
from expander_sae.evaluation.metrics import Reconstruction, ReconstructionMeter, ce_recovered
from expander_sae.lm import (
    Clean,
    Hook,
    Intervention,
    LanguageModel,
    NormGuard,
    Site,
    mismatches,
    special_ids,
    structural_ids,
)
from expander_sae.lm.norms import Multiple, guard_for_evaluation
from expander_sae.progress import progress
from expander_sae.sae import SAE


class MismatchError(ValueError):
    """SAEs evaluated in another model, or at another place in it, than they were trained on."""


@dataclass(frozen=True)
class InModel:
    """An SAE inside its language model.

    Attributes:
        reconstruction: on the replaced positions.
        ce_clean, ce_zero, ce_recon: next-token cross-entropy in nats with the activations at the site left alone, set
            to zero, set to the reconstruction, at the positions named by ``replaced``.
        ce_recovered: see :func:`ce_recovered`.
        convention: by which it was measured, see :class:`Convention`.
        replaced: ``"all-but-first"`` (position 0 keeps its value: it is an attention sink) or ``"all"``.
        left_alone: other positions that kept their value because of their norm, or as special tokens if the training
            set has none, in all three cases; or as special tokens that the convention does not reconstruct.
        norm_limit: norms above it were left alone; ``None``: no limit.
        norm_limit_source: where the median behind the limit comes from.
        predictions: next-token predictions the cross-entropies average over.
        seconds: spent in encoding and decoding, not in the language model.
    """

    reconstruction: Reconstruction
    ce_clean: float
    ce_zero: float
    ce_recon: float
    ce_recovered: float | None
    convention: str
    replaced: Replaced
    left_alone: int
    norm_limit: float | None
    norm_limit_source: str
    predictions: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Flat, for JSON and tables."""
        flat = asdict(self)
        return flat.pop("reconstruction") | flat


@dataclass(frozen=True)
class _Untouched:
    """A batch of windows in the model without an SAE.

    ``keep (B, T)``: positions that are reconstructed. ``counted (B, T - 1)``: those whose prediction counts.
    """

    before: Clean
    keep: Tensor
    counted: Tensor
    ce: Mapping[str, float]


class SharedPasses:
    """What evaluations of one SAE after another have in common: the model without an SAE, run once.

    Hand the same one to every call. It holds the activations of the windows; another model, site, convention, limit
    or other windows start it afresh.
    """

    def __init__(self) -> None:
        self._lm: LanguageModel | None = None
        self._key: Any = None
        self._batches: list[_Untouched] = []

    def batch(self, number: int, lm: LanguageModel, key: Any, compute: Callable[[], _Untouched]) -> _Untouched:
        """Batch ``number`` under ``key`` in ``lm``, computed if it is the next one."""
        if lm is not self._lm or key != self._key:
            self._lm, self._key, self._batches = lm, key, []
        if number == len(self._batches):
            self._batches.append(compute())
        return self._batches[number]


@torch.no_grad()
def evaluate_in_model(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    windows: Sequence[Tensor],
    layer: int,
    *,
    hook: Hook | None = None,
    convention: str | Convention = "ours",
    replaced: Replaced | None = None,
    max_norm_multiple: Multiple = "recorded",
    allow_mismatch: bool = False,
    batch_windows: int = 4,
    shared: SharedPasses | None = None,
) -> dict[str, InModel]:
    """Evaluate many SAEs on the same held-out windows, sharing what the model computes before their site.

    Args:
        saes: by name; each reads the activations at block ``layer``.
        lm: the language model they were trained on.
        windows: token sequences ``(T,)`` of one length.
        layer: block whose activations are replaced.
        hook: its output (``"residual"``), attention or MLP; default: the one the SAEs record, else its output.
        convention: how to measure, a name of :data:`CONVENTIONS`.
        replaced: which positions, if other than the convention says.
        max_norm_multiple: where the convention guards norms, leave alone and count positions whose norm exceeds this
            multiple of the median norm; ``None`` for no limit. The median is the one the SAEs record, else it is taken
            over the first 4,096 positions of the windows. ``"recorded"``: the multiple too, 10 if there is none.
        allow_mismatch: evaluate even if weights, tokenizer, layer or hook are not those the SAEs record.
        batch_windows: windows a forward pass.
        shared: what earlier calls computed without an SAE, and this one will leave to later ones.

    Raises:
        ValueError: an SAE of another width, no windows, windows of several lengths, shorter than two tokens or longer
            than the model's context, SAEs of several hooks; :class:`MismatchError` where they were trained on another
            model or site.
    """
    if not windows or windows[0].shape[0] < 2:
        raise ValueError("evaluation needs at least one window of at least two tokens")
    if len({tuple(window.shape) for window in windows}) > 1:
        raise ValueError("the windows must have one length")
    lm.check_window(windows[0].shape[0])
    lm.check_layer(layer)
    for name, sae in saes.items():
        if sae.d_in != lm.d_model:
            raise ValueError(f"{name} reads d_in = {sae.d_in}, the model's residual stream has width {lm.d_model}")
    how = convention_named(convention).with_replaced(replaced)
    origins = _origins(saes)
    site = Site(layer, hook or _recorded_hook(origins))
    if not allow_mismatch and (lines := differences(saes, lm, layer, hook)):
        raise MismatchError(
            "this is not what the SAEs were trained on:\n  " + "\n  ".join(lines) + "\nName the model, revision, layer "
            "and hook they were trained on, or evaluate all the same: allow_mismatch=True, on the command line "
            "--allow-mismatch."
        )
    run = _Run(saes, lm, windows, site, how, max_norm_multiple, origins)
    text = torch.stack(list(windows))
    key = (site, how, run.guard.limit, len(run.special), batch_windows, text.numpy(force=True).tobytes())
    with progress("evaluate in the model", len(windows) * len(run.ce), "window") as advance:
        for number, tokens in enumerate(text.split(batch_windows)):
            compute = partial(run.untouched, tokens.to(lm.device))
            run.add(compute() if shared is None else shared.batch(number, lm, key, compute), advance)
    return run.results()


class _Run:
    """One evaluation: what is kept of a window, and the sums."""

    def __init__(
        self,
        saes: Mapping[str, SAE],
        lm: LanguageModel,
        windows: Sequence[Tensor],
        site: Site,
        how: Convention,
        multiple: Multiple,
        origins: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.saes, self.how = saes, how
        self.intervention = Intervention(lm, site)
        skip_special = how.guarded and any(origin.get("skip_special") for origin in origins.values())
        none = torch.empty(0, device=lm.device)
        self.special = special_ids(lm.tokenizer).to(lm.device) if skip_special else none
        self.excluded = structural_ids(lm.tokenizer).to(lm.device) if how.special_excluded else none
        self.guard = NormGuard(float("nan"), None, "the convention has no limit")
        if how.guarded:
            self.guard = guard_for_evaluation(origins.values(), lm, windows, site, multiple, self._calibrates)
        self.meters = {name: ReconstructionMeter(sae.d_sae) for name, sae in saes.items()}
        self.seconds = dict.fromkeys(saes, 0.0)
        self.ce = dict.fromkeys(["clean", "zero", *(f"sae:{name}" for name in saes)], 0.0)
        self.predictions = self.left_alone = 0

    def _calibrates(self, tokens: Tensor) -> Tensor:
        """Positions that the median norm is taken over: as in a harvest, not the first of a window."""
        counted = ~torch.isin(tokens, self.special.to(tokens))
        counted[:, 0] = False
        return counted

    def _zeroed(self, tokens: Tensor, clean: Tensor) -> Tensor:
        """Which positions are set to zero, bool ``(B, T)``."""
        zeroed = ~(self.guard.too_large(clean) | torch.isin(tokens, self.special.to(tokens)))
        zeroed[:, 0] = self.how.replaced == "all"
        return zeroed

    def untouched(self, tokens: Tensor) -> _Untouched:
        """The batch ``tokens (B, T)`` without an SAE, and with zeros."""
        before = self.intervention.read(tokens)
        clean = before.activations
        zeroed = self._zeroed(tokens, clean)
        included = ~torch.isin(tokens, self.excluded.to(tokens))
        counted = included[:, :-1]
        zero = _with_positions(clean, zeroed, torch.zeros_like(clean[zeroed]))
        streams = {"clean": clean, "zero": zero}
        ce = {name: self._cross_entropy(before, counted, stream) for name, stream in streams.items()}
        return _Untouched(before, zeroed & included, counted, ce)

    def _cross_entropy(self, before: Clean, counted: Tensor, activations: Tensor) -> float:
        logits = self.intervention.logits(before, activations)[:, :-1]
        # Summed, in float32.
        return float(F.cross_entropy(logits[counted].float(), before.tokens[:, 1:][counted], reduction="sum"))

    def add(self, batch: _Untouched, advance: Any) -> None:
        """One batch with every SAE."""
        before, keep, count = batch.before, batch.keep, len(batch.before.tokens)
        clean = before.activations
        self.predictions += int(batch.counted.sum())
        meant = keep if self.how.replaced == "all" else keep[:, 1:]
        self.left_alone += int((~meant).sum())
        for name, ce in batch.ce.items():
            self.ce[name] += ce
            advance(count)
        h = clean[keep]
        for name, sae in self.saes.items():
            began = time.perf_counter()
            code = sae.encode(h.to(sae.b_dec.device))
            recon = sae.decode(code)
            self.seconds[name] += time.perf_counter() - began
            self.meters[name].add(h, recon, code)
            changed = _with_positions(clean, keep, recon.to(clean))
            self.ce[f"sae:{name}"] += self._cross_entropy(before, batch.counted, changed)
            advance(count)

    def results(self) -> dict[str, InModel]:
        ce = {name: total / self.predictions for name, total in self.ce.items()}
        return {
            name: InModel(
                reconstruction=self.meters[name].result(),
                ce_clean=ce["clean"],
                ce_zero=ce["zero"],
                ce_recon=ce[f"sae:{name}"],
                ce_recovered=ce_recovered(ce["clean"], ce["zero"], ce[f"sae:{name}"]),
                convention=self.how.name,
                replaced=self.how.replaced,
                left_alone=self.left_alone,
                norm_limit=self.guard.limit,
                norm_limit_source=self.guard.source,
                predictions=self.predictions,
                seconds=self.seconds[name],
            )
            for name in self.saes
        }


def evaluation_rows(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    windows: Sequence[Tensor],
    layer: int,
    *,
    hook: Hook | None = None,
    convention: str | Convention = "ours",
    replaced: Replaced | None = None,
    max_norm_multiple: Multiple = "recorded",
    allow_mismatch: bool = False,
    shared: SharedPasses | None = None,
) -> list[dict[str, Any]]:
    """One flat row for each SAE: its sizes, :class:`InModel` under its own encoder, and under OMP (``omp_...``).

    The same dictionary read by OMP shows what the encoder leaves on the table: the amortisation gap. ``signed``: the
    SAE's own codes may be negative; those of OMP always may. Arguments and errors as :func:`evaluate_in_model`.
    """
    pursued = {f"{name} (OMP)": sae.with_encoder("omp") for name, sae in saes.items()}
    results = evaluate_in_model(
        {**saes, **pursued}, lm, windows, layer, hook=hook, convention=convention, replaced=replaced,
        max_norm_multiple=max_norm_multiple, allow_mismatch=allow_mismatch, shared=shared,
    )  # fmt: skip
    rows = []
    for name, sae in saes.items():
        best = results[f"{name} (OMP)"].to_dict()
        under_omp = {
            f"omp_{key}": best[key] for key in ("relative_error", "fvu", "ce_recon", "ce_recovered", "seconds")
        }
        training = sae.metadata.get("training") or {}
        facts = {
            "name": name,
            "dictionary": sae.dictionary.kind,
            "degree": sae.dictionary.degree,
            "encoder": sae.encoder.kind,
            "signed": sae.signed,
            "d_sae": sae.d_sae,
            "k": sae.k,
            "num_values": sae.num_values,
            "num_bytes": sae.num_bytes,
            "dead": training.get("dead"),
            "train_seconds": training.get("seconds"),
        }
        rows.append(facts | results[name].to_dict() | under_omp)
    return rows


def _recorded_hook(origins: Mapping[str, Mapping[str, Any]]) -> Hook:
    hooks = {origin["hook"] for origin in origins.values() if origin.get("hook")}
    if len(hooks) > 1:
        raise ValueError(f"the SAEs were trained on several hooks ({', '.join(sorted(hooks))}): evaluate them apart")
    return hooks.pop() if hooks else "residual"


def differences(saes: Mapping[str, SAE], lm: LanguageModel, layer: int, hook: Hook | None = None) -> list[str]:
    """In what the model and the site differ from those the SAEs record; one line for each difference.

    ``hook``: the one they record by default. SAEs that record nothing differ in nothing.
    """
    origins = _origins(saes)
    site = Site(layer, hook or _recorded_hook(origins))
    lines = (line for origin in origins.values() for line in mismatches(origin, lm, site.layer, site.hook))
    return list(dict.fromkeys(lines))


def _origins(saes: Mapping[str, SAE]) -> dict[str, Mapping[str, Any]]:
    found = {name: sae.metadata.get("trained_on") for name, sae in saes.items()}
    return {name: origin if isinstance(origin, Mapping) else {} for name, origin in found.items()}


def _with_positions(clean: Tensor, keep: Tensor, new: Tensor) -> Tensor:
    """``clean (B, T, m)`` with the rows where ``keep (B, T)`` exchanged for ``new``."""
    changed = clean.clone()
    changed[keep] = new
    return changed
