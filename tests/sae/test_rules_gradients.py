"""Gradients of the whole loss of each sparsity rule: against finite differences and the paper's pseudo-derivatives.

The reference here is dense and plain: ``(B, n)`` scores, masks and sums, written from the papers' formulas.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from expander_sae.mask import Mask
from expander_sae.ops import SparseCode
from expander_sae.sae import SAE, Gated, JumpReLU, ReluL1
from expander_sae.sae.sparsity import Adapted
from expander_sae.training.losses import rule_terms

M, N, K, D, B = 8, 20, 4, 3, 40
UNIT, COEFFICIENT, BANDWIDTH = 1.3, 0.7, 0.4
MASK = Mask.build("balanced", d_in=M, d_sae=N, degree=D, seed=2)
Parameters = dict[str, Tensor]

RULES: dict[str, Callable[[], Adapted]] = {
    "relu-l1": lambda: ReluL1(N, K, capacity=N, coefficient=COEFFICIENT),
    "gated": lambda: Gated(N, K, capacity=N, coefficient=COEFFICIENT),
    "jumprelu": lambda: JumpReLU(N, K, capacity=N, coefficient=COEFFICIENT, bandwidth=BANDWIDTH),
}
KINDS = [(dictionary, untied) for dictionary in ("expander", "dense") for untied in (False, True)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sae_of(kind: str, dictionary: str, untied: bool) -> SAE:
    """All parameters away from special values, in float64, training."""
    rule = RULES[kind]()
    if dictionary == "expander":
        sae = SAE.expander(MASK, K, untied=untied, sparsity=rule, seed=1)
    else:
        sae = SAE.dense(M, N, k=K, untied=untied, sparsity=rule, seed=1)
    sae = sae.double()
    rule.unit.fill_(UNIT)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sae.named_parameters()):
            if not name.endswith("values"):
                parameter.copy_(0.3 * normal(*parameter.shape, seed=10 + number))
        if isinstance(rule, JumpReLU):
            rule.log_threshold -= 1.0
    return sae.train()


def loss_of(sae: SAE, h: Tensor) -> Tensor:
    """As the trainer adds it up."""
    error = sae.squared_error(h)
    return error.error + sum(rule_terms(sae, h, error.code))


def columns(sae: SAE, values: Tensor) -> Tensor:
    """``(m, n)`` from stored values, without normalising."""
    if sae.dictionary.kind == "dense":
        return values.T
    return values.new_zeros(N, M).scatter(1, MASK.rows.long(), values).T


def plain_loss(kind: str, sae: SAE, p: Parameters, frozen: Parameters, h: Tensor) -> Tensor:
    """The papers' loss at parameters ``p``; ``frozen`` is what the auxiliary decoder of Gated is held at."""
    w = columns(sae, p["dictionary.values"] / p["dictionary.values"].norm(dim=1, keepdim=True))
    v = columns(sae, p["encoder.values"]) if "encoder.values" in p else w
    u = (h - p["b_dec"]) @ v
    b_enc, unit = p["encoder.b_enc"], UNIT
    if kind == "gated":
        gate = (u + b_enc).relu()
        x = (gate > 0) * (p["sparsity.r_mag"].exp() * u + p["sparsity.b_mag"]).relu()
        still = columns(sae, frozen["dictionary.values"] / frozen["dictionary.values"].norm(dim=1, keepdim=True))
        guess = gate @ still.T + frozen["b_dec"]
        terms = COEFFICIENT * unit * gate.sum(dim=1) + (h - guess).square().sum(dim=1)
    elif kind == "relu-l1":
        x = (u + b_enc).relu()
        terms = COEFFICIENT * unit * x.sum(dim=1)
    else:
        z = u + b_enc
        x = z * (z > p["sparsity.log_threshold"].exp() * unit)
        terms = COEFFICIENT * unit**2 * (x != 0).double().sum(dim=1)
    return ((h - x @ w.T - p["b_dec"]).square().sum(dim=1) + terms).mean()


def parameters_of(sae: SAE) -> Parameters:
    return {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(("dictionary", "untied"), KINDS)
def test_loss_and_gradients_are_those_of_the_plain_formula(kind: str, dictionary: str, untied: bool) -> None:
    sae, h = sae_of(kind, dictionary, untied), normal(B, M, seed=3)
    loss = loss_of(sae, h)
    loss.backward()
    at = parameters_of(sae)
    torch.testing.assert_close(loss.detach(), plain_loss(kind, sae, at, at, h))
    step = 1e-6
    for seed, (name, parameter) in enumerate(sae.named_parameters()):
        if name == "sparsity.log_threshold":  # the true derivative is zero; its own test is below
            continue
        direction = normal(*parameter.shape, seed=100 + seed)
        ends = [plain_loss(kind, sae, at | {name: at[name] + sign * step * direction}, at, h) for sign in (1, -1)]
        assert parameter.grad is not None, name
        assert float((parameter.grad != 0).double().mean()) > 0.5, name
        expected = float(ends[0] - ends[1]) / (2 * step)
        assert float((parameter.grad * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize(("dictionary", "untied"), KINDS)
def test_thresholds_get_the_papers_pseudo_derivative(dictionary: str, untied: bool) -> None:
    sae, h = sae_of("jumprelu", dictionary, untied), normal(B, M, seed=3)
    loss_of(sae, h).backward()
    p = parameters_of(sae)
    w = sae.dictionary.to_dense()
    v = columns(sae, p["encoder.values"]) if untied else w
    z, theta = (h - p["b_dec"]) @ v + p["encoder.b_enc"], p["sparsity.log_threshold"].exp() * UNIT
    x = z * (z > theta)
    by_x = -2 * (h - x @ w.T - p["b_dec"]) @ w / B  # of the squared error
    width = BANDWIDTH * UNIT
    by_theta = torch.zeros(N, dtype=torch.float64)
    above = below = 0
    for sample in range(B):
        for j in range(N):
            if z[sample, j] > 0 and abs(z[sample, j] - theta[j]) < width / 2:
                above, below = above + int(z[sample, j] > theta[j]), below + int(z[sample, j] <= theta[j])
                by_theta[j] -= theta[j] / width * by_x[sample, j]  # Rajamanoharan et al. 2024b, eq. 11
                by_theta[j] -= COEFFICIENT * UNIT**2 / width / B  # and eq. 12
    assert min(above, below) > 10
    gradient = sae.sparsity.get_parameter("log_threshold").grad
    torch.testing.assert_close(gradient, by_theta * theta)  # through the exponential


@pytest.mark.parametrize("kind", RULES)
def test_the_code_in_training_and_in_evaluation_is_one(kind: str) -> None:
    sae, h = sae_of(kind, "expander", True), normal(B, M, seed=4)
    training = sae.encode(h)
    evaluated = sae.eval().encode(h)
    torch.testing.assert_close(training.to_dense(N), evaluated.to_dense(N))
    counts = (evaluated.values != 0).sum(dim=1)
    assert 0 < counts.min() < counts.max() < N
    empty = evaluated.values == 0
    assert (evaluated.indices[empty] == 0).all()
    assert (evaluated.values >= 0).all()
    assert not sae.signed
    in_a_cube = sae.encode(h.reshape(4, 10, M))
    assert torch.equal(in_a_cube.to_dense(N).reshape(B, N), evaluated.to_dense(N))


@pytest.mark.parametrize("kind", RULES)
def test_overflow_keeps_the_best(kind: str) -> None:
    sae, h = sae_of(kind, "expander", False), normal(B, M, seed=4)
    rule = sae.sparsity
    assert isinstance(rule, Adapted)
    whole = sae.eval().encode(h).to_dense(N).detach()
    z = (h - sae.b_dec.detach()) @ sae.dictionary.to_dense() + sae.encoder.get_parameter("b_enc").detach()
    rank = z - rule.threshold.detach() if isinstance(rule, JumpReLU) else z
    rule.capacity = K
    best = torch.zeros_like(rank).scatter(1, rank.topk(K, dim=1).indices, 1.0)
    assert int(((whole != 0).sum(dim=1) > K).sum()) > 5
    torch.testing.assert_close(sae.encode(h).to_dense(N), whole * best)


@pytest.mark.parametrize("kind", RULES)
def test_folding_the_scale_is_exact(kind: str) -> None:
    sae, h = sae_of(kind, "expander", True).eval(), normal(B, M, seed=5)
    before, loss = sae.encode(3 * h).to_dense(N), float(loss_of(sae.train(), 3 * h).detach())
    sae.rescale_(3.0)
    torch.testing.assert_close(sae.eval().encode(h).to_dense(N), before / 3)
    assert float(loss_of(sae.train(), h).detach()) == pytest.approx(loss / 9)  # penalties follow the squared error


def test_what_a_step_hands_on_is_outside_the_graph() -> None:
    for kind in RULES:
        code = sae_of(kind, "expander", False).squared_error(normal(B, M, seed=6)).code
        assert code.values.requires_grad
        assert type(code.detach()) is SparseCode
        assert not code.detach().values.requires_grad
