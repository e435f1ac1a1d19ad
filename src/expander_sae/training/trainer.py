"""The one training loop: every variant is a dictionary, an encoder, a sparsity rule and a :class:`TrainConfig`.

The run around its steps, with folder, log, checkpoints and signals, is :func:`expander_sae.training.train`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from expander_sae import __version__
from expander_sae.data.sources import ActivationSource, prefetch
from expander_sae.dictionary import Basis
from expander_sae.sae import SAE
from expander_sae.training.config import TrainConfig
from expander_sae.training.dead import FeatureUse, resample
from expander_sae.training.divergence import TrainingDiverged, check_losses, not_finite
from expander_sae.training.losses import aux_error, multi_error, rule_terms
from expander_sae.training.start import mean_and_variance, origin_of

_START_ROWS = 2048  # from which a sparsity rule takes its first thresholds

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors, and everything else as JSON values: what a checkpoint holds."""


class Trainer:
    """One training run, step by step.

    ``initialise()`` (or ``restore(state)``), then ``step(0)``, ``step(1)``, … in order, at last ``finish()``. In
    between the SAE may be one of scaled activations, and is one of their coordinates if its dictionary has a basis;
    ``finish()`` brings it back to those of the source.

    Args:
        sae: trained in place, where it is; batches follow it to its device and type. One that was trained before goes
            on from there.
        source: activations of width ``sae.d_in``.
        config: the recipe.

    Attributes:
        scale: what activations are multiplied with.
        basis: what they are rotated into, after :meth:`initialise`; ``None`` where the dictionary has none.
        variance: ``mean ‖h - h̄‖²`` of the activations as trained on: the FVU of the log is a fraction of it.
        use: counters of fires.
        resampled: features re-aimed so far.

    Raises:
        ValueError: wrong width, too few rows, AuxK for an encoder that ranks no features, or Multi-TopK without TopK.
    """

    def __init__(self, sae: SAE, source: ActivationSource, config: TrainConfig) -> None:
        if source.d_in != sae.d_in:
            raise ValueError(f"the activations have width {source.d_in}, the SAE reads d_in = {sae.d_in}")
        if config.aux_k and not sae.encoder.ranks_features:
            raise ValueError(
                "AuxK needs an encoder's scores of dead features: for a pursuit set aux_k=0 and resample instead"
            )
        if config.multi_topk and not (sae.encoder.ranks_features and sae.sparsity.by_rank):
            raise ValueError(
                f"Multi-TopK widens the code of the rule 'topk' with a tied or untied encoder, not that of "
                f"{sae.sparsity.kind!r} with {sae.encoder.kind!r}: set multi_topk=0"
            )
        source.batches(config.batch_size, config.seed)  # refuses what it cannot deliver
        self.sae, self.source, self.config = sae, source, config
        sae.certificate = None  # it is of the dictionary that was
        self.device = sae.b_dec.device
        self.scale = 1.0
        self.basis: Basis | None = None
        self.variance = 0.0
        self.resampled = 0
        self.use = FeatureUse(sae.d_sae, self.device)
        self.origin = origin_of(source, sae)
        self._before: dict[str, Any] | None = sae.metadata.get("training")
        basis = sae.dictionary.basis
        told = {"dtype": str(sae.dtype), "metadata": None, "basis": None if basis is None else basis.sha256}
        self._identity = {
            "sae": sae.config() | told,
            "train": config.identity(),
            "rows": len(source),
            "trained_on": self.origin,
            "continues": self._before and {key: self._before.get(key) for key in ("seconds", "tokens_seen")},
        }
        self._parameters = list(sae.parameters())
        fused = self.device.type == "cpu"  # on CUDA it wants its step counts there, which a checkpoint does not keep
        self._optimiser = torch.optim.Adam(self._parameters, lr=config.lr, betas=(0.9, 0.999), eps=1e-8, fused=fused)
        self._batches: Generator[Tensor] | None = None
        self._losses: list[Tensor] = []  # since the last report: read in one go, so that a GPU need not wait each step
        self._start: Tensor | None = None  # the loss of the first step
        self._fvu: float | None = None  # of the last report
        self._done = 0
        self._longer: list[int] = []  # steps for which the run was planned before it was made longer
        self._seconds = 0.0
        self._clock = time.perf_counter()

    def identity(self) -> dict[str, Any]:
        """What must agree for a saved state to be continued, as JSON: that of the run's beginning."""
        return self._identity

    def initialise(self) -> None:
        """Mean and variance of the activations, put to the use that the recipe asks for.

        Raises:
            ValueError: the sampled activations are all equal.
        """
        config, sae = self.config, self.sae
        mean, variance = mean_and_variance(self.source, config.seed)
        if variance <= 0:
            raise ValueError("all sampled activations are equal: there is nothing to learn")
        self.variance = variance
        self._enter()
        if config.scale_activations:
            scale = math.sqrt(sae.d_in / variance)
            sae.rescale_(1 / scale)  # biases that were trained before follow the activations
            self.scale, self.variance = scale, float(sae.d_in)
        if config.b_dec_init == "mean" and not bool(sae.b_dec.any()):
            with torch.no_grad():
                start = mean if self.basis is None else self.basis.coordinates(mean)
                sae.b_dec.copy_(start.to(self.device) * self.scale)
        if sae.sparsity.wants_start:
            sample = self.source.sample(min(_START_ROWS, len(self.source)), config.seed).to(self.device, sae.dtype)
            sample = sample if self.basis is None else self.basis.coordinates(sample)
            sae.begin(sample * self.scale)

    def step(self, step: int) -> Tensor:
        """Step number ``step``, from 0, on the source's next batch; returns its squared error, not waited for.

        Raises:
            TrainingDiverged: the encoder cannot read the numbers any more.
        """
        if self._batches is None:
            batches = self.source.batches(self.config.batch_size, self.config.seed, step)
            self._batches = prefetch(self._prepared(itertools.islice(batches, self.config.steps - step)))
        loss = self.learn(next(self._batches), step)
        self._losses.append(loss)
        return loss

    def learn(self, h: Tensor, step: int) -> Tensor:
        """One optimiser step on the batch ``h (B, d_in)``, as the SAE is trained on it: on its device, scaled.

        ``step`` gives the learning rate and whether to resample. Returns the squared error before the step.
        """
        config, sae = self.config, self.sae
        try:
            error, residual, code = sae.squared_error(h)
        except ValueError as reason:  # a pursuit refuses what is not finite
            if self._done and bool(h.isfinite().all()):
                broken = ", ".join(not_finite(sae)) or "the codes"
                raise TrainingDiverged(f"by step {step + 1} {broken} hold NaN or infinity ({reason})") from None
            raise
        loss = error
        if config.aux_k and (dead := self.use.dead(config.dead_after)) is not None:
            loss = loss + config.aux_coefficient * aux_error(sae, h, residual, dead, config.aux_k)
        if config.multi_topk:
            loss = loss + config.multi_coefficient * multi_error(sae, h, config.multi_topk)
        for term in rule_terms(sae, h, code):
            loss = loss + term
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, config.clip_norm)
        self._optimiser.param_groups[0]["lr"] = config.lr_at(step)
        self._optimiser.step()

        code = code.detach()
        self.use.count(code)
        sae.sparsity.after_step(code)
        if config.resample_every and (step + 1) % config.resample_every == 0 and step + 1 < config.steps:
            self.resampled += resample(sae, self.use, residual, config, step)
        self._done = step + 1
        error = error.detach()
        self._start = error if self._start is None else self._start
        return error

    def check(self) -> float | None:
        """Mean loss since the last report; ``None`` if there was no step.

        Raises:
            TrainingDiverged: see there.
        """
        if not self._losses:
            return None
        losses = torch.stack(self._losses).tolist()
        start = losses[0] if self._start is None else float(self._start)
        return check_losses(losses, self._done - len(losses) + 1, start, self.variance, self.sae)

    def report(self) -> dict[str, Any]:
        """A line of the log over the steps since the last one. Raises as :meth:`check`."""
        loss = self.check()
        if loss is None:
            raise ValueError("there was no step since the last report")
        count, self._losses = len(self._losses), []
        elapsed = self._lap()
        self._fvu = loss / self.variance
        return {
            "step": self._done,
            "loss": loss / self.scale**2,
            "fvu": self._fvu,
            "dead": self.use.num_dead(self.config.dead_after),
            "resampled": self.resampled,
            "lr": self.config.lr_at(self._done - 1),
            "tokens_per_second": count * self.config.batch_size / elapsed,
        } | self.sae.sparsity.report()

    def state(self) -> State:
        """Everything the rest of the run depends on, and what rebuilds the SAE."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for key, value in self._optimiser.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value
        tensors |= {"fires": self.use.fires, "idle_tokens": self.use.idle_tokens}
        if self.basis is not None:
            tensors |= {f"basis.{name}": tensor for name, tensor in self.basis.stored_tensors().items()}
        tensors["losses"] = torch.stack(self._losses) if self._losses else torch.zeros(0)
        self._lap()
        numbers = {
            "step": self._done,
            "steps": self.config.steps,
            "longer": self._longer,
            "scale": self.scale,
            "variance": self.variance,
            "seconds": self._seconds,
            "start": None if self._start is None else float(self._start),
            "fvu": self._fvu,
            "resampled": self.resampled,
            "before": self._before,
            "basis": None if self.basis is None else self.basis.config(),
            "sae": self.sae.config() | {"metadata": self.sae.metadata | {"training": self.summary()}},
        }
        return tensors, numbers

    def restore(self, saved: State) -> int:
        """Continue from :meth:`state`; returns the step to go on with."""
        tensors, numbers = saved
        self._enter()
        self.sae.load_state_dict({k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")})
        for name, parameter in self.sae.named_parameters():
            prefix = f"adam.{name}."
            self._optimiser.state[parameter] = {
                key.removeprefix(prefix): value.to("cpu" if key.endswith(".step") else self.device, copy=True)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        fires, idle = (tensors[name].to(self.device, copy=True) for name in ("fires", "idle_tokens"))
        self.use.restore(fires, idle)
        self._losses = list(tensors["losses"].to(self.device, copy=True))
        self.scale, self.variance, self._seconds = numbers["scale"], numbers["variance"], numbers["seconds"]
        self._start = None if numbers["start"] is None else torch.tensor(numbers["start"], dtype=torch.float64)
        self._fvu, self._before, self.resampled = numbers["fvu"], numbers["before"], numbers["resampled"]
        self._done, self._longer = numbers["step"], list(numbers["longer"])
        if numbers["steps"] != self.config.steps:
            self._longer.append(numbers["steps"])
        return self._done

    def finish(self) -> None:
        """Stop reading ahead and bring the SAE back to activations as the source has them, in evaluation mode."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
        self.sae.rescale_(self.scale)
        self.scale = 1.0
        self.sae.enter_basis_(self.basis)
        self.basis = None
        self.sae.eval()

    def summary(self) -> dict[str, Any]:
        """What is kept of the run in the SAE's metadata."""
        more = {"longer_than_planned": self._longer} if self._longer else {}
        more |= {"continues": self._before} if self._before else {}
        return {
            "config": asdict(self.config),
            "rows": len(self.source),
            "steps": self._done,
            "fvu": self._fvu,
            "dead": self.use.num_dead(self.config.dead_after),
            "resampled": self.resampled,
            "tokens_seen": self._done * self.config.batch_size,
            "seconds": self._seconds,
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "torch": torch.__version__,
            "expander_sae": __version__,
        } | more

    def _enter(self) -> None:
        """The SAE's metadata speak of this run from now on; figures measured before it no longer hold."""
        self.sae.train()
        self.basis = self.sae.leave_basis_()
        self.sae.metadata["trained_on"] = self.origin
        self.sae.metadata.pop("metrics", None)
        self._clock = time.perf_counter()

    def _prepared(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Batches on the SAE's device and of its type, in its basis, scaled."""
        for h in batches:
            moved = h.to(self.device, self.sae.dtype)
            if self.basis is not None:
                moved = self.basis.coordinates(moved)
            if self.scale != 1.0:
                moved = h * self.scale if moved is h else moved.mul_(self.scale)
            yield moved

    def _lap(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        self._seconds += elapsed
        return elapsed
