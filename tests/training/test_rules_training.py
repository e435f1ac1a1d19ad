"""Sparsity rules through the one loop: wanted counts are reached, runs resume, folders come back, losses add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.training import MODERN, QUICK, D, K, M, N, activations, expander, interrupted, log_of, same, state
from torch import Tensor

from expander_sae.data.sources import TensorSource
from expander_sae.mask import Mask
from expander_sae.sae import SAE, BatchTopK, Gated, JumpReLU, ReluL1, Sparsity, TopK
from expander_sae.sae.sparsity import Adapted
from expander_sae.training import TrainConfig, Trainer, train
from expander_sae.training.checkpoint import CHECKPOINT_NAME
from expander_sae.training.losses import multi_error
from expander_sae.training.recipe import resolve
from expander_sae.training.saved import load_sae

RULES: dict[str, Callable[[], Adapted]] = {
    "relu-l1": lambda: ReluL1(N, K),
    "jumprelu": lambda: JumpReLU(N, K),
    "gated": lambda: Gated(N, K),
}
LONG = replace(MODERN, aux_k=0, steps=300, lr=2e-2, batch_size=64, log_every=50)


def with_rule(rule: Sparsity, *, dense: bool = False, untied: bool = False) -> SAE:
    return SAE.dense(M, N, k=K, untied=untied, sparsity=rule) if dense else expander(sparsity=rule, untied=untied)


# Rules with an adapted coefficient


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(("dense", "untied"), [(False, False), (True, True)])
def test_the_loss_falls_and_the_wanted_count_is_reached(kind: str, dense: bool, untied: bool) -> None:
    sae, h = with_rule(RULES[kind](), dense=dense, untied=untied), activations()
    train(sae, TensorSource(h), LONG)
    code = sae.encode(h)
    counts = (code.values != 0).sum(dim=1).double()
    assert float(counts.mean()) == pytest.approx(K, rel=0.2)
    assert counts.std() > 0.3
    assert (h - sae(h)).square().sum() < 0.6 * (h - h.mean(dim=0)).square().sum()


@pytest.mark.parametrize("start", [0.01, 10.0])
def test_the_coefficient_finds_its_way_from_far_off(start: float) -> None:
    counts = {}
    for rate in (0.0, 0.05):
        sae = with_rule(ReluL1(N, K, coefficient=start, rate=rate))
        train(sae, TensorSource(activations()), LONG)
        counts[rate] = float((sae.encode(activations()).values != 0).sum(dim=1).double().mean())
    assert counts[0.05] == pytest.approx(K, rel=0.2)
    assert abs(counts[0.0] - K) > K / 2  # without adapting it does not


@pytest.mark.parametrize("kind", RULES)
def test_the_unit_of_the_activations_does_not_matter(kind: str) -> None:
    """Thresholds, bandwidth and coefficient follow it: a power of two changes no digit."""
    ends = []
    for factor in (1.0, 64.0):
        sae, h = with_rule(RULES[kind]()).double(), factor * activations(dtype=torch.float64)
        train(sae, TensorSource(h), replace(MODERN, aux_k=0))
        ends.append(sae.encode(h).to_dense(N) / factor)
    torch.testing.assert_close(ends[0], ends[1])


def test_features_fire_as_often_as_wanted_from_the_first_step() -> None:
    rows = torch.randn(4000, M, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 5, M) + 7
    for kind, make in RULES.items():
        sae = with_rule(make())
        Trainer(sae, TensorSource(rows), LONG).initialise()
        rates = (sae.encode(rows * (M / rows.var(dim=0).sum()) ** 0.5).to_dense(N) != 0).double().mean(dim=0)
        assert float(rates.sum()) == pytest.approx(K, rel=0.1), kind
        assert rates.min() > 0.5 * K / N


@pytest.mark.parametrize(("kind", "untied"), [("relu-l1", False), ("jumprelu", True), ("gated", False)])
def test_resumed_runs_end_bit_for_bit_the_same(kind: str, untied: bool, tmp_path: Path) -> None:
    config, ends = replace(MODERN, resample_every=9, resample_below=3, dead_after=60), []
    for at in (None, 13):
        folder = tmp_path / str(at)
        if at is not None:
            with pytest.raises(KeyboardInterrupt):
                train(with_rule(RULES[kind](), untied=untied), interrupted(at), config, folder)
        sae = with_rule(RULES[kind](), untied=untied)
        train(sae, TensorSource(activations()), config, folder)
        ends.append((state(sae), log_of(folder)))
    for end, log in ends[1:]:
        assert same(end, ends[0][0])
        assert log == ends[0][1]
    assert ends[0][1][-1].keys() >= {"l0", "overflow", "coefficient"}


@pytest.mark.parametrize("kind", RULES)
def test_folders_and_checkpoints_bring_everything_back(kind: str, tmp_path: Path) -> None:
    sae = with_rule(RULES[kind](), untied=True)
    train(sae, TensorSource(activations()), MODERN, tmp_path)
    again = SAE.from_pretrained(tmp_path)
    assert again.config() == sae.config()
    assert same(state(again), state(sae))
    assert torch.equal(again(activations()), sae(activations()))
    assert same(state(load_sae(tmp_path / CHECKPOINT_NAME)), state(sae))
    rule_bytes = 4 * sum(tensor.numel() for tensor in sae.sparsity.stored_tensors().values())
    assert rule_bytes == 4 * (4 + {"relu-l1": 0, "jumprelu": N, "gated": 2 * N}[kind])
    assert sae.num_bytes == 4 * (2 * N * D + N + M) + rule_bytes


@pytest.mark.parametrize("kind", RULES)
def test_going_on_keeps_unit_and_coefficient(kind: str) -> None:
    sae = with_rule(RULES[kind]())
    train(sae, TensorSource(activations()), replace(MODERN, aux_k=0))
    before = state(sae)
    trainer = Trainer(sae, TensorSource(5 * activations()), replace(MODERN, aux_k=0))
    trainer.initialise()
    trainer.finish()
    after = state(sae)
    assert all(torch.allclose(after[name], tensor, rtol=1e-5) for name, tensor in before.items())


@pytest.mark.parametrize("kind", RULES)
def test_sixteen_bits_hold_the_weights_and_not_the_running_means(kind: str) -> None:
    sae = with_rule(RULES[kind]()).bfloat16()
    rule = sae.sparsity
    assert isinstance(rule, Adapted)
    train(sae, TensorSource(activations()), replace(MODERN, aux_k=0))
    assert {sae.dtype, sae.encoder.get_parameter("b_enc").dtype} == {torch.bfloat16}
    assert {buffer.dtype for buffer in rule.buffers()} == {torch.float32}
    assert float(rule.strength) not in (rule.coefficient, float(rule.strength.bfloat16()))
    assert sae.double().sparsity.get_buffer("strength").dtype == torch.float64


@pytest.mark.parametrize("kind", RULES)
def test_features_that_are_re_aimed_start_like_the_others(kind: str) -> None:
    sae = with_rule(RULES[kind]())
    train(sae, TensorSource(activations()), MODERN)
    sae.reset_features(torch.tensor([3, 5]), activations()[:2])
    rates = (sae.encode(activations()).to_dense(N) != 0).double().mean(dim=0)
    assert rates[[3, 5]].max() < 0.5  # with biases and thresholds at 0 it is half


@pytest.mark.parametrize("kind", [*RULES, "batch-topk"])
def test_a_pursuit_is_refused_by_name(kind: str) -> None:
    sizes = {"d_sae": N, "k": K, "degree": D}
    with pytest.raises(ValueError, match="the pursuit 'omp' chooses features itself"):
        resolve({"preset": kind, "encoder": "omp"} | sizes).sae.build(M)


def test_free_columns_are_refused() -> None:
    for kind, make in RULES.items():
        with pytest.raises(ValueError, match=f"'{kind}' needs unit_norm=True"):
            expander(sparsity=make(), unit_norm=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": K - 1}, "capacity must be between"),
        ({"coefficient": -1.0}, "coefficient must be finite and not negative, got -1"),
        ({"rate": float("inf")}, "rate must be finite and not negative, got inf"),
        ({"bandwidth": 0.0}, "bandwidth must be positive and finite, got 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JumpReLU(N, K, **options)  # type: ignore[arg-type]


# BatchTopK


def test_batch_topk_holds_its_mean_on_single_samples() -> None:
    sae, h = expander(sparsity=BatchTopK(N, K)), activations(2000)
    train(sae, TensorSource(h[:1500]), replace(LONG, steps=400))
    threshold = float(sae.sparsity.get_buffer("threshold"))
    code = sae.encode(h[1500:])
    counts = (code.values != 0).sum(dim=1).double()
    assert threshold > 0
    assert float(code.values[code.values != 0].detach().min()) > threshold
    assert float(counts.mean()) == pytest.approx(K, rel=0.1)
    assert counts.std() > 0.3


# AuxK and Multi-TopK


def gradients(sae: SAE) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


def plain_scores(sae: SAE, h: Tensor) -> tuple[Tensor, Tensor]:
    """``W (m, n)`` and the scores ``(B, n)``, in plain autograd."""
    w = sae.dictionary.matrix().to_dense()
    own = sae.encoder.own(sae.dictionary.matrix()).to_dense()  # type: ignore[operator]
    return w, (h - sae.b_dec) @ own + sae.encoder.get_parameter("b_enc")


def best(z: Tensor, count: int) -> Tensor:
    return z * torch.zeros_like(z).scatter(1, z.topk(count, dim=1).indices, 1.0)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("untied", [False, True])
def test_a_step_with_auxk_has_the_gradient_of_the_plain_formula(dense: bool, untied: bool) -> None:
    """AuxK reaches encoder and decoder, and reconstructs the residual without ``b_dec``, which the residual lacks."""
    sae = with_rule(TopK(N, K), dense=dense, untied=untied).double()
    h, dead = activations(40, torch.float64), [2, 9, 17]
    with torch.no_grad():
        sae.b_dec += 3.0
        sae.encoder.get_parameter("b_enc")[dead] = -100.0
    config = replace(MODERN, aux_k=2, aux_coefficient=0.25, clip_norm=1e9)
    trainer = Trainer(sae, TensorSource(activations(dtype=torch.float64)), config)
    trainer.use.idle_tokens[dead] = config.dead_after + 1

    w, z = plain_scores(sae, h)
    residual = h - best(z, K) @ w.T - sae.b_dec
    guess = best(z[:, dead], 2) @ w[:, dead].T
    error = residual.square().sum(dim=1).mean()
    sae.zero_grad()
    (error + 0.25 * (residual.detach() - guess).square().sum(dim=1).mean()).backward()
    expected = gradients(sae)

    sae.zero_grad()
    trainer.learn(h, 0)
    found = gradients(sae)
    assert found.keys() == expected.keys() >= {"dictionary.values", "encoder.b_enc", "b_dec"}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
        if len(gradient) == N:  # the dead get theirs from AuxK alone
            assert (found[name][dead] != 0).any()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("untied", [False, True])
def test_multi_topk_is_the_error_at_more_features(dense: bool, untied: bool) -> None:
    sae, h = with_rule(TopK(N, K), dense=dense, untied=untied).double(), activations(40, torch.float64)
    config = replace(MODERN, aux_k=0, multi_topk=4, clip_norm=1e9)
    w, z = plain_scores(sae, h)
    errors = [(h - best(z, count) @ w.T - sae.b_dec).square().sum(dim=1).mean() for count in (K, 4 * K)]
    sae.zero_grad()
    (errors[0] + errors[1] / 8).backward()
    expected = gradients(sae)
    sae.zero_grad()
    Trainer(sae, TensorSource(activations(dtype=torch.float64)), config).learn(h, 0)
    for name, gradient in gradients(sae).items():
        torch.testing.assert_close(gradient, expected[name])
    torch.testing.assert_close(multi_error(sae, h, N), multi_error(sae, h, N // K))  # never more than all


def test_codes_trained_with_multi_topk_may_be_made_wider() -> None:
    errors = {}
    for times in (0, 4):
        sae = expander(relu=True)
        train(sae, TensorSource(activations()), replace(LONG, multi_topk=times, multi_coefficient=0.5))
        errors[times] = float(multi_error(sae, activations(), 4).detach())
    assert errors[4] < 0.8 * errors[0]


@pytest.mark.parametrize("make", [lambda: expander(sparsity=BatchTopK(N, K)), lambda: expander().with_encoder("omp")])
def test_multi_topk_needs_topk(make: Callable[[], SAE]) -> None:
    with pytest.raises(ValueError, match=r"Multi-TopK widens the code of the rule 'topk' .* set multi_topk=0"):
        Trainer(make(), TensorSource(activations()), replace(QUICK, multi_topk=4))


# Presets


def test_presets_of_rules_are_modern_with_another_rule() -> None:
    modern = resolve({"preset": "modern"}).to_dict()
    for preset in ("batch-topk", "relu-l1", "jumprelu", "gated"):
        found = resolve({"preset": preset}).to_dict()
        changed = {name for name in found if found[name] != modern[name]}
        assert changed == {"preset", "sparsity", "sparsity_options"}
        assert found["sparsity"] == preset
    multi = resolve({"preset": "multi-topk"}).to_dict()
    assert {name for name in multi if multi[name] != modern[name]} == {"preset", "multi_topk"}
    for other in ({"sparsity": "gated"}, {"encoder": "omp"}):
        assert resolve({"preset": "multi-topk"} | other).train.multi_topk == 0


def test_a_rule_is_json_all_through() -> None:
    for make in RULES.values():
        assert json.loads(json.dumps(make().config())) == make().config()


def test_masks_that_are_not_drawn_serve_every_rule(tmp_path: Path) -> None:
    rows = Mask.build("balanced", d_in=M, d_sae=N, degree=D).rows
    for make in RULES.values():
        sae = SAE.expander(Mask.from_rows(rows, M), K, sparsity=make())
        train(sae, TensorSource(activations()), TrainConfig(steps=3, batch_size=32), tmp_path, restart=True)
        assert torch.equal(SAE.from_pretrained(tmp_path)(activations()), sae(activations()))
