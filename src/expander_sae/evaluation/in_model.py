"""An SAE inside its language model: cross-entropy with the layer replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from expander_sae.evaluation.metrics import Reconstruction, ReconstructionMeter, ce_recovered
from expander_sae.lm import LanguageModel, continue_from, residual
from expander_sae.progress import progress
from expander_sae.sae import SAE

Replaced = Literal["all-but-first", "all"]
Reconstruct = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class InModel:
    """An SAE inside its language model.

    Attributes:
        reconstruction: on the replaced positions.
        ce_clean, ce_zero, ce_recon: next-token cross-entropy in nats with the residual stream left alone, set to zero,
            set to the reconstruction, at the positions named by ``replaced``.
        ce_recovered: see :func:`ce_recovered`.
        replaced: ``"all-but-first"`` (position 0 keeps its value: it is an attention sink) or ``"all"``.
        left_alone: other positions that kept their value because of their norm, in all three cases.
        predictions: next-token predictions the cross-entropies average over.
        seconds: spent in encoding and decoding, not in the language model.
    """

    reconstruction: Reconstruction
    ce_clean: float
    ce_zero: float
    ce_recon: float
    ce_recovered: float | None
    replaced: Replaced
    left_alone: int
    predictions: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Flat, for JSON and tables."""
        flat = asdict(self)
        return flat.pop("reconstruction") | flat


@torch.no_grad()
def evaluate_in_model(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    windows: Sequence[Tensor],
    layer: int,
    *,
    replaced: Replaced = "all-but-first",
    max_norm_multiple: float | None = 10.0,
    batch_windows: int = 4,
) -> dict[str, InModel]:
    """Evaluate many SAEs on the same held-out windows, sharing the model's blocks up to ``layer``.

    Args:
        saes: by name; each reads the output of block ``layer``.
        lm: the language model they were trained on.
        windows: token sequences ``(T,)`` of one length.
        layer: block whose output is replaced.
        replaced: which positions; see :class:`InModel`.
        max_norm_multiple: leave alone and count positions whose norm exceeds this multiple of the median norm, which
            is taken over the first batch and then held; ``None`` for no limit. As in harvesting: a single attention
            sink in mid-window would be nearly all of the variance.
        batch_windows: windows a forward pass.

    Raises:
        ValueError: an SAE of another width, no windows, windows of several lengths or shorter than two tokens.
    """
    if not windows or windows[0].shape[0] < 2:
        raise ValueError("evaluation needs at least one window of at least two tokens")
    if len({tuple(window.shape) for window in windows}) > 1:
        raise ValueError("the windows must have one length")
    for name, sae in saes.items():
        if sae.d_in != lm.d_model:
            raise ValueError(f"{name} reads d_in = {sae.d_in}, the model's residual stream has width {lm.d_model}")
    if replaced not in ("all-but-first", "all"):
        raise ValueError(f"replaced must be 'all-but-first' or 'all', got {replaced!r}")
    first = 1 if replaced == "all-but-first" else 0
    meters = {name: ReconstructionMeter(sae.d_sae) for name, sae in saes.items()}
    seconds = dict.fromkeys(saes, 0.0)
    ce = dict.fromkeys(["clean", "zero", *(f"sae:{name}" for name in saes)], 0.0)
    predictions = left_alone = 0
    limit: float | None = None
    with progress("evaluate in the model", len(windows) * len(ce), "window") as advance:
        for start in range(0, len(windows), batch_windows):
            tokens = torch.stack(list(windows[start : start + batch_windows])).to(lm.device)
            clean = residual(lm, tokens, layer)
            predictions += tokens[:, 1:].numel()
            variants: dict[str, Tensor] = {"clean": clean}
            norms = clean.float().norm(dim=2)
            if limit is None:
                multiple = float("inf") if max_norm_multiple is None else max_norm_multiple
                limit = multiple * float(norms[:, first:].median())
            keep = norms <= limit
            keep[:, :first] = False
            left_alone += int((~keep[:, first:]).sum())
            h = clean[keep]
            variants["zero"] = _with_positions(clean, keep, torch.zeros_like(h))
            for name, sae in saes.items():
                began = time.perf_counter()
                code = sae.encode(h.to(sae.b_dec.device))
                recon = sae.decode(code)
                seconds[name] += time.perf_counter() - began
                meters[name].add(h, recon, code)
                variants[f"sae:{name}"] = _with_positions(clean, keep, recon.to(clean))
            for name, stream in variants.items():
                logits = continue_from(lm, tokens, layer, stream)
                ce[name] += float(_cross_entropy(logits, tokens))
                advance(tokens.shape[0])
    ce = {name: total / predictions for name, total in ce.items()}
    return {
        name: InModel(
            reconstruction=meters[name].result(),
            ce_clean=ce["clean"],
            ce_zero=ce["zero"],
            ce_recon=ce[f"sae:{name}"],
            ce_recovered=ce_recovered(ce["clean"], ce["zero"], ce[f"sae:{name}"]),
            replaced=replaced,
            left_alone=left_alone,
            predictions=predictions,
            seconds=seconds[name],
        )
        for name in saes
    }


def evaluation_rows(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    windows: Sequence[Tensor],
    layer: int,
    *,
    replaced: Replaced = "all-but-first",
) -> list[dict[str, Any]]:
    """One flat row an SAE: its sizes, :class:`InModel` under its own encoder, and under OMP (``omp_...``).

    The same dictionary read by OMP shows what the encoder leaves on the table: the amortisation gap. Arguments and
    errors as :func:`evaluate_in_model`.
    """
    pursued = {f"{name} (OMP)": sae.with_encoder("omp") for name, sae in saes.items()}
    results = evaluate_in_model({**saes, **pursued}, lm, windows, layer, replaced=replaced)
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
            "d_sae": sae.d_sae,
            "k": sae.k,
            "num_values": sae.num_values,
            "num_bytes": sae.num_bytes,
            "dead": training.get("dead"),
            "train_seconds": training.get("seconds"),
        }
        rows.append(facts | results[name].to_dict() | under_omp)
    return rows


def _with_positions(clean: Tensor, keep: Tensor, new: Tensor) -> Tensor:
    """``clean (B, T, m)`` with the rows where ``keep (B, T)`` exchanged for ``new``."""
    changed = clean.clone()
    changed[keep] = new
    return changed


def _cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Summed over all next-token predictions, in float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")
