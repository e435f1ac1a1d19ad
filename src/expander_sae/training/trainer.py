"""The one training loop: every variant is a dictionary, an encoder and a :class:`TrainConfig`."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from expander_sae import __version__
from expander_sae.data.sources import ActivationSource
from expander_sae.ops import SparseCode
from expander_sae.progress import progress
from expander_sae.sae import SAE
from expander_sae.training.checkpoint import CHECKPOINT_NAME, Checkpoint
from expander_sae.training.log import LOG_NAME, TrainingLog

_STATISTICS_ROWS = 16384  # sample for the mean and scale of activations
_DIVERGENCE_FACTOR = 10.0  # loss against its own start, each a mean over a logging interval


@dataclass(frozen=True)
class TrainConfig:
    """What the loop does. The defaults are the paper's recipe (THEORY §0.2)."""

    steps: int = 5000
    """Optimiser steps."""
    batch_size: int = 256
    """Activation vectors a step."""
    lr: float = 3e-4
    """Adam's learning rate at the first step (after warm-up); one cosine period leads down to ``lr_final``."""
    lr_final: float = 1e-5
    """Where the cosine ends, after the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    clip_norm: float = 1.0
    """Global gradient norm is clipped to this."""
    b_dec_init: Literal["zero", "mean"] = "zero"
    """Where ``b_dec`` starts; ``mean`` is the mean of a sample of the activations."""
    scale_activations: bool = False
    """Train on activations scaled to ``mean ‖h - h̄‖² = d_in``; folded back into the biases at the end, exactly."""
    resample_every: int = 1000
    """Re-aim features that fired fewer than ``resample_below`` times every so many steps; 0 never does."""
    resample_below: int = 5
    """Fires between two resamplings under which a feature is re-aimed at a residual on its support."""
    aux_k: int = 0
    """Dead features that help to reconstruct the residual (AuxK, Gao et al. 2024, §2.4); 0 leaves the term out."""
    aux_coefficient: float = 1 / 32
    """Weight of the AuxK term."""
    dead_after: int = 100_000
    """Tokens without a fire after which a feature counts as dead, for AuxK and for the log."""
    seed: int = 0
    """Order of the batches and choice of resampling targets."""
    log_every: int = 50
    """Steps between two lines of the log."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "dead_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        from_zero = ("warmup_steps", "resample_every", "resample_below", "aux_k", "aux_coefficient", "lr_final", "seed")
        for name in from_zero:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not (self.lr > 0 and self.clip_norm > 0):
            raise ValueError(f"lr and clip_norm must be positive, got {self.lr} and {self.clip_norm}")
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if self.b_dec_init not in ("zero", "mean"):
            raise ValueError(f"b_dec_init must be 'zero' or 'mean', got {self.b_dec_init!r}")

    def lr_at(self, step: int) -> float:
        """Learning rate of step ``0 <= step < steps``."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return (self.lr_final + (self.lr - self.lr_final) * cosine) * min(1.0, (step + 1) / max(1, self.warmup_steps))


def mean_and_variance(source: ActivationSource, seed: int) -> tuple[Tensor, float]:
    """``h̄ (d_in,)`` in float64 and ``mean ‖h - h̄‖²``, both of a sample: where training starts from."""
    sample = source.sample(min(_STATISTICS_ROWS, len(source)), seed).double()
    mean = sample.mean(dim=0)
    return mean, float((sample - mean).square().sum(dim=1).mean())


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite, or grew far above its start. The message names step, losses and checkpoint."""


def train(
    sae: SAE,
    source: ActivationSource,
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    restart: bool = False,
    trackers: tuple[str, ...] = (),
    description: str = "train",
) -> dict[str, Any]:
    """Train ``sae`` in place on ``source``; returns a summary, also stored in ``sae.metadata["training"]``.

    With ``out``, the folder gets ``log.jsonl``, a checkpoint every ``checkpoint_every`` steps, and at the end the SAE
    itself. Run again with the same arguments after an interruption, it continues from the checkpoint, and the
    weights come out bit for bit as if it had never stopped (same machine, same number of threads).

    Args:
        sae: moved nowhere; batches follow it to its device and type.
        source: activations of width ``sae.d_in``.
        config: the recipe.
        out: folder for log, checkpoints and the result.
        restart: discard a checkpoint instead of continuing from it.
        trackers: any of ``"tensorboard"``, ``"wandb"``.
        description: what the progress bar says.

    Raises:
        ValueError: wrong width, too few rows, AuxK for a pursuit, or a checkpoint of another configuration in ``out``.
        TrainingDiverged: see there.
        KeyboardInterrupt: after the step in progress, with a checkpoint written. The SAE is usable as far as it got.
    """
    if source.d_in != sae.d_in:
        raise ValueError(f"the activations have width {source.d_in}, the SAE reads d_in = {sae.d_in}")
    if config.aux_k and not sae.encoder.ranks_features:
        raise ValueError(
            "AuxK needs an encoder's scores of dead features: for a pursuit set aux_k=0 and resample instead"
        )
    loop = _Loop(sae, source, config)
    described = sae.config() | {"dtype": str(sae.dtype), "metadata": None}
    identity = {
        "sae": described,
        "train": asdict(config),
        "rows": len(source),
        "trained_on": sae.metadata.get("trained_on"),
    }
    checkpoint = None if out is None else Checkpoint(Path(out) / CHECKPOINT_NAME, identity)
    if checkpoint is not None and restart:
        checkpoint.path.unlink(missing_ok=True)
    saved = None if checkpoint is None else checkpoint.load()
    start = 0 if saved is None else loop.restore(saved)
    log = TrainingLog(None if out is None else Path(out) / LOG_NAME, start, trackers, identity)
    try:
        if saved is None:
            loop.initialise()
        with progress(description, config.steps, "step", done=start) as advance, _deferred_interrupt() as interrupted:
            for step in range(start, config.steps):
                loop.step(step)
                last = step + 1 == config.steps
                if (step + 1) % config.log_every == 0 or last:
                    line = loop.report(step, log.tail(), checkpoint)
                    log.write(line)
                    advance(step + 1 - max(start, step // config.log_every * config.log_every), note=_note(line))
                stop = interrupted.is_set()
                if checkpoint is not None and ((step + 1) % config.checkpoint_every == 0 or last or stop):
                    loop.check(step, log.tail(), checkpoint)
                    checkpoint.save(loop.state(step + 1))
                if stop:
                    raise KeyboardInterrupt
    finally:
        sae.rescale_(loop.scale)  # interrupted or not: the checkpoint has what goes on
        log.close()
    summary = loop.summary()
    sae.metadata["training"] = summary
    if out is not None:
        sae.save_pretrained(out)
    return summary


class _Loop:
    """State of one training run."""

    def __init__(self, sae: SAE, source: ActivationSource, config: TrainConfig) -> None:
        self.sae, self.source, self.config = sae, source, config
        self.device = sae.b_dec.device
        self.scale = 1.0
        self.variance = 0.0  # mean ‖h - h̄‖² of the activations as trained on: what the FVU of the log is a fraction of
        self.fires = torch.zeros(sae.d_sae, dtype=torch.int64, device=self.device)  # since the last resampling
        self.idle_tokens = torch.zeros(sae.d_sae, dtype=torch.int64, device=self.device)  # tokens since the last fire
        fused = self.device.type == "cpu"  # on CUDA it wants its step counts there, which a checkpoint does not keep
        self.optimiser = torch.optim.Adam(sae.parameters(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8, fused=fused)
        self.batches: Iterator[Tensor] | None = None
        self.losses: list[Tensor] = []  # since the last look: read in one go, so that a GPU need not wait each step
        self.first_loss: float | None = None
        self.seconds = 0.0
        self.clock = time.perf_counter()
        self.resampled = 0

    def initialise(self) -> None:
        """Mean and variance of the activations, put to the use that the recipe asks for."""
        config = self.config
        mean, self.variance = mean_and_variance(self.source, config.seed)
        if self.variance <= 0:
            raise ValueError("all sampled activations are equal: there is nothing to learn")
        if config.scale_activations:
            self.scale = math.sqrt(self.sae.d_in / self.variance)
            self.variance = float(self.sae.d_in)
        if config.b_dec_init == "mean":
            with torch.no_grad():
                self.sae.b_dec.copy_(mean.to(self.device) * self.scale)

    def step(self, step: int) -> None:
        """One optimiser step."""
        config, sae = self.config, self.sae
        if self.batches is None:
            self.batches = self.source.batches(config.batch_size, config.seed, step)
        h = next(self.batches).to(self.device, sae.dtype)
        if self.scale != 1.0:
            h = h * self.scale
        for group in self.optimiser.param_groups:
            group["lr"] = config.lr_at(step)
        error, residual, code = sae.squared_error(h)
        loss = error + self._auxiliary(h, residual) if config.aux_k else error
        penalty = sae.sparsity.penalty(code)
        loss = loss if penalty is None else loss + penalty
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip_norm)
        self.optimiser.step()

        self.losses.append(error.detach())
        self._count(code)
        sae.sparsity.after_step(code)
        if config.resample_every and (step + 1) % config.resample_every == 0 and step + 1 < config.steps:
            self._resample(residual, step)

    def _auxiliary(self, h: Tensor, residual: Tensor) -> Tensor:
        """AuxK: the squared error of the dead features' best attempt at the residual."""
        dead = (self.idle_tokens > self.config.dead_after).nonzero().flatten()
        if not len(dead):
            return h.new_zeros(())
        guess = self.sae.reconstruct_with(h, dead, min(self.config.aux_k, len(dead)))
        return self.config.aux_coefficient * (residual - guess).square().sum(dim=1).mean()

    def _count(self, code: SparseCode) -> None:
        fired = (code.values != 0).flatten()
        fires = torch.zeros_like(self.fires).scatter_add_(0, code.indices.flatten().long(), fired.long())
        self.fires += fires
        self.idle_tokens += code.indices.shape[0]
        self.idle_tokens[fires > 0] = 0

    def _resample(self, residual: Tensor, step: int) -> None:
        """Aim rarely firing features at residuals, drawn with probability proportional to their energy."""
        features = (self.fires < self.config.resample_below).nonzero().flatten()
        self.fires.zero_()
        energy = residual.square().sum(dim=1)
        # The paper leaves a dictionary alone that is dead for the greater part: the fault is elsewhere then.
        if (
            not 0 < len(features) <= 0.8 * self.sae.d_sae
            or not bool(torch.isfinite(energy).all())
            or not bool(energy.any())
        ):
            return
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) % 2**64)
        chosen = torch.multinomial(energy.cpu().double(), len(features), replacement=True, generator=generator)
        self.sae.reset_features(features, residual[chosen.to(self.device)])
        self.idle_tokens[features] = 0
        self.resampled += len(features)

    def check(self, step: int, tail: list[dict[str, Any]], checkpoint: Checkpoint | None) -> float:
        """Mean loss since the last look; raises :class:`TrainingDiverged`. Steps are numbered as in the log."""
        if not self.losses:
            return self.first_loss or 0.0
        losses = torch.stack(self.losses).tolist()
        mean = sum(losses) / len(losses)
        first = step - len(losses) + 2
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        # A gradient can overflow where the loss does not; such weights must reach no checkpoint.
        broken = [name for name, parameter in self.sae.named_parameters() if not bool(torch.isfinite(parameter).all())]
        what = None
        if bad is not None:
            what = f"at step {first + bad} the loss is not finite"
        elif broken:
            what = f"by step {step + 1} {', '.join(broken)} hold NaN or infinity"
        elif self.first_loss is not None and mean > _DIVERGENCE_FACTOR * self.first_loss:
            what = f"from step {first} to {step + 1} the loss is {mean / self.first_loss:.0f} times its start"
        if what:
            curve = ", ".join(f"{line['step']}: {line['loss']:.4g}" for line in tail) or "none logged yet"
            kept = f"The last good checkpoint is {checkpoint.path}." if checkpoint and checkpoint.path.exists() else ""
            raise TrainingDiverged(
                f"training diverged: {what}. Logged before (step: loss): {curve}. {kept} "
                "Try a lower lr, scale_activations=True, b_dec_init='mean', or another seed."
            )
        return mean

    def report(self, step: int, tail: list[dict[str, Any]], checkpoint: Checkpoint | None) -> dict[str, Any]:
        """A line of the log over the steps since the last one."""
        loss = self.check(step, tail, checkpoint)
        self.first_loss = loss if self.first_loss is None else self.first_loss
        count, self.losses = len(self.losses), []
        now = time.perf_counter()
        elapsed, self.clock = now - self.clock, now
        self.seconds += elapsed
        return {
            "step": step + 1,
            "loss": loss / self.scale**2,
            "fvu": loss / self.variance,
            "dead": int((self.idle_tokens > self.config.dead_after).sum()),
            "resampled": self.resampled,
            "lr": self.config.lr_at(step),
            "tokens_per_second": count * self.config.batch_size / elapsed,
        }

    def state(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the rest of the run depends on."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value
        tensors |= {"fires": self.fires, "idle_tokens": self.idle_tokens}
        tensors["losses"] = torch.stack(self.losses) if self.losses else torch.zeros(0)
        elapsed = self.seconds + time.perf_counter() - self.clock
        numbers = {
            "step": step,
            "scale": self.scale,
            "variance": self.variance,
            "seconds": elapsed,
            "first_loss": self.first_loss,
            "resampled": self.resampled,
        }
        return tensors, numbers

    def restore(self, saved: tuple[dict[str, Tensor], dict[str, Any]]) -> int:
        """Continue from :meth:`state`; returns the step to go on with."""
        tensors, numbers = saved
        self.sae.load_state_dict({k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")})
        for name, parameter in self.sae.named_parameters():
            prefix = f"adam.{name}."
            self.optimiser.state[parameter] = {
                key.removeprefix(prefix): value if key.endswith(".step") else value.to(self.device)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        self.fires, self.idle_tokens = tensors["fires"].to(self.device), tensors["idle_tokens"].to(self.device)
        self.losses = list(tensors["losses"].to(self.device))
        self.scale, self.variance, self.seconds = numbers["scale"], numbers["variance"], numbers["seconds"]
        self.first_loss, self.resampled = numbers["first_loss"], numbers["resampled"]
        return numbers["step"]

    def summary(self) -> dict[str, Any]:
        """What is kept of the run in the SAE's config."""
        return {
            "config": asdict(self.config),
            "rows": len(self.source),
            "dead": int((self.idle_tokens > self.config.dead_after).sum()),
            "tokens_seen": self.config.steps * self.config.batch_size,
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "torch": torch.__version__,
            "expander_sae": __version__,
        }


def _note(line: dict[str, Any]) -> str:
    return f"FVU {line['fvu'] or math.nan:.3f}  dead {line['dead']:,}"


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of breaking into a half-done step; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals are the main thread's affair
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
