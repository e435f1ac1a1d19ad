"""A training step of each sparsity rule: on an expander, on a dense dictionary, and in SAELens."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import Shape, activations, dense_sae, expander_sae
from benchmarks.checks import same_number
from benchmarks.measure import Race, Row, Settings
from benchmarks.step import DENSE_COPIES, loop_step
from expander_sae.sae import SAE, SPARSITIES
from expander_sae.training.losses import rule_terms

RULES = ("batch-topk", "relu-l1", "jumprelu", "gated")


def run(shape: Shape, settings: Settings) -> list[Row]:
    """One race for each rule, so that a ratio is always to the same rule."""
    h = activations(shape.d_in, settings.batch)
    return [row for kind in RULES for row in _race(shape, settings, kind, h)]


def ours(kind: str) -> str:
    """What the table calls the expander with a rule."""
    return f"expander {kind}"


def _race(shape: Shape, settings: Settings, kind: str, h: Tensor) -> list[Row]:
    """All start from the same columns, biases and thresholds, and their first losses must agree, penalties included."""
    race = Race("rules", shape, settings)
    template = rule_sae(shape, kind, h)
    loss = loss_of(template, h)
    race.enter(ours(kind), lambda: loop_step(rule_sae(shape, kind, h), h), samples=len(h), ours=True)
    race.note(ours(kind), f"loss {loss:.6g}, {share_at_capacity(template, h):.1%} of samples at capacity")

    needs = (DENSE_COPIES + 1) * shape.dense_bytes + 12 * len(h) * shape.d_sae
    name = f"dense dictionary, {kind}"
    first: list[float] = []

    def dense() -> partial[float]:
        sae = dense_sae(shape, template)
        first.append(loss_of(sae, h))
        step = loop_step(sae, h)
        return partial(step)

    race.enter(name, dense, samples=len(h), needs=needs)
    if first:
        same_number(name, first[0], loss)
        race.note(name, "same loss")

    name = f"SAELens {kind}"
    if peers.module("sae_lens") is None:
        race.absent(name, peers.NOT_INSTALLED)
        return race.rows()
    build = partial(peers.saelens_rule_step, template, h)
    answer = race.enter(name, build, samples=len(h), needs=needs + 16 * len(h) * shape.d_sae)
    if answer is not None:
        # It has no capacity: where ours overflows, the losses differ by what was left out.
        overflow = share_at_capacity(template, h)
        if not overflow:
            same_number(name, answer, loss)
        race.note(name, f"loss {answer:.6g}, not compared" if overflow else "same loss")
    return race.rows()


def rule_sae(shape: Shape, kind: str, h: Tensor) -> SAE:
    """An expander SAE with that rule, its thresholds where training on ``h (B, d_in)`` starts them."""
    sae = expander_sae(shape, SPARSITIES[kind](shape.d_sae, shape.k))
    sae.begin(h)
    return sae.train()


def loss_of(sae: SAE, h: Tensor) -> float:
    """Squared error and everything that the rule adds."""
    with torch.no_grad():
        error = sae.squared_error(h)
        return float(error.error + sum(rule_terms(sae, h, error.code)))


def share_at_capacity(sae: SAE, h: Tensor) -> float:
    """Samples that have as many features as their code has room for."""
    with torch.no_grad():
        code = sae.squared_error(h).code
    return float(((code.values != 0).sum(dim=1) == code.k).double().mean())
