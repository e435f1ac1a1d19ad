"""One training step, forward, backward, clip and Adam: the project's loop against SAELens and a tuned dense step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import Shape, activations, dense_sae, expander_sae
from benchmarks.checks import WrongAnswer, same_number, same_pursuit, same_tensor
from benchmarks.encode import PRECISIONS, Precision, matmul_precision
from benchmarks.measure import Race, Row, Settings, fits
from expander_sae.data.sources import TensorSource
from expander_sae.pursuit import solver
from expander_sae.sae import SAE
from expander_sae.training import TrainConfig, Trainer

OURS = "expander TopK"
PURSUIT_ENCODERS = {
    "expander MP + refit": lambda k: ("matching-pursuit", {}),
    "expander OMP, 4 rounds": lambda k: ("omp", {"block": -(-k // 4), "disjoint": True}),
}
"""Training with a pursuit as the encoder: name to solver and options for ``k`` features."""

_GRADIENT_SAMPLES = 64
_PURSUIT_SAMPLES = 16
DENSE_COPIES = 8  # encoder and decoder, each with its gradient and two moments


def run(shape: Shape, settings: Settings) -> list[Row]:
    """All contenders start from the same columns and biases, and their first losses must agree."""
    race = Race("step", shape, settings)
    batch = settings.batch
    h = activations(shape.d_in, batch)
    template = expander_sae(shape)

    loss = race.enter(OURS, lambda: loop_step(expander_sae(shape), h), samples=batch, ours=True)
    assert loss is not None
    with torch.no_grad():
        same_number(OURS, loss, float(loss_of(template, h)))
    race.note(OURS, f"loss {loss:.6g}")

    for name, encoder in PURSUIT_ENCODERS.items():
        solver_name, options = encoder(shape.k)
        _check_pursuit(name, template, h[:_PURSUIT_SAMPLES], solver_name, options)
        first = race.enter(name, partial(_pursuing, shape, h, solver_name, options), samples=batch, ours=True)
        race.note(name, f"loss {first:.6g}, another encoder; its codes are the reference's")

    scores = 4 * batch * shape.d_sae
    needs = (DENSE_COPIES + 1) * shape.dense_bytes + 3 * scores
    _dense(race, shape, template, h, loss, needs)
    _saelens(race, shape, template, h, loss, needs + 4 * scores)
    return race.rows()


def _dense(race: Race, shape: Shape, template: SAE, h: Tensor, loss: float, needs: int) -> None:
    if fits(needs):
        check_gradients(template, dense_sae(shape, template), h[:_GRADIENT_SAMPLES])
    names = {precision: f"dense PyTorch, {precision} precision" for precision in PRECISIONS}
    contender: DenseStep | None = None
    losses: dict[Precision, float] = {}

    def build() -> Callable[[], float]:
        nonlocal contender
        contender = DenseStep(dense_sae(shape, template), h)
        losses.update({precision: contender.loss(precision) for precision in PRECISIONS})
        return partial(contender, "highest")

    race.enter(names["highest"], build, samples=len(h), needs=needs)
    if contender is None:
        race.absent(names["medium"], "skipped, as above")
        return
    same_number(names["highest"], losses["highest"], loss)
    race.note(names["highest"], "same loss and gradients")
    try:
        same_number(names["medium"], losses["medium"], loss)
    except WrongAnswer as error:
        race.absent(names["medium"], f"left out, not float32 on this processor ({error})")
        return
    # One set of weights for both: two would not fit at the widest size.
    second = partial(contender, "medium")
    race.enter(names["medium"], lambda: second, samples=len(h), shares=names["highest"])
    race.note(names["medium"], "same loss and gradients")


def _saelens(race: Race, shape: Shape, template: SAE, h: Tensor, loss: float, needs: int) -> None:
    for sparse in (False, True):
        name = "SAELens TopKTrainingSAE" + (", sparse activations" if sparse else "")
        if peers.module("sae_lens") is None:
            race.absent(name, peers.NOT_INSTALLED)
            continue
        build = partial(peers.saelens_step, shape, template, h, sparse=sparse)
        first = race.enter(name, build, samples=len(h), needs=needs)
        if first is not None:
            same_number(name, first, loss)
            race.note(name, "same loss")


def loop_step(sae: SAE, h: Tensor, lr: float = TrainConfig.lr) -> Callable[[], float]:
    """The training loop's own step, always on ``h``; returns its loss."""
    config = TrainConfig(steps=1 << 30, batch_size=len(h), lr=lr, resample_every=0)
    trainer = Trainer(sae, TensorSource(h), config)
    return lambda: float(trainer.learn(h, 0))


class DenseStep:
    """The bare step of a dense SAE with a fused Adam: no counters, no log. A call does one and returns its loss."""

    def __init__(self, sae: SAE, h: Tensor) -> None:
        self.sae, self.h = sae, h
        self.optimiser = torch.optim.Adam(sae.parameters(), lr=3e-4, fused=True)

    @torch.no_grad()
    def loss(self, precision: Precision) -> float:
        """The loss as the weights are."""
        with matmul_precision(precision):
            return float(loss_of(self.sae, self.h))

    def __call__(self, precision: Precision) -> float:
        with matmul_precision(precision):
            loss = loss_of(self.sae, self.h)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
            self.optimiser.step()
        return float(loss.detach())


def loss_of(sae: SAE, h: Tensor) -> Tensor:
    """Mean squared error of a sample, by the training loop's own path."""
    return sae.squared_error(h).error


def check_gradients(expander: SAE, dense: SAE, h: Tensor) -> None:
    """The tied expander's gradient is the dense encoder's plus the dense decoder's on the mask, along the unit sphere.

    Raises:
        WrongAnswer: it is not, or the biases' gradients differ.
    """
    for sae in (expander, dense):
        sae.zero_grad(set_to_none=True)
        loss_of(sae, h).backward()
    gradients = {name: parameter.grad for name, parameter in expander.named_parameters()}
    others = {name: parameter.grad for name, parameter in dense.named_parameters()}
    for sae in (expander, dense):
        sae.zero_grad(set_to_none=True)
    columns = torch.zeros(())
    for name, gradient in others.items():
        assert gradient is not None
        if name.endswith("values"):
            columns = columns + gradient
        else:
            own = gradients[name]
            assert own is not None
            same_tensor(f"gradient of {name}", own, gradient)
    rows, unit = expander.get_buffer("dictionary.rows").long(), expander.dictionary.values.detach()
    columns = columns.gather(1, rows)
    own = gradients["dictionary.values"]
    assert own is not None
    same_tensor("gradient of the columns", own, columns - unit * (unit * columns).sum(dim=1, keepdim=True))


def _pursuing(shape: Shape, h: Tensor, name: str, options: dict[str, Any]) -> Callable[[], float]:
    return loop_step(expander_sae(shape).with_encoder(name, **options), h)


def _check_pursuit(name: str, sae: SAE, h: Tensor, solver_name: str, options: dict[str, Any]) -> None:
    matrix, centred = sae.dictionary.matrix().detach(), h - sae.b_dec.detach()
    pursue = solver(solver_name)
    codes = [pursue(centred, matrix, sae.k, backend=backend, **options) for backend in (None, "reference")]
    relative = [(centred - matrix.decode(code)).norm(dim=1) / centred.norm(dim=1) for code in codes]
    same_pursuit(name, [code.indices for code in codes], relative)
