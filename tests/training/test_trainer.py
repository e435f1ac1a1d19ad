"""The training loop: the recipe against a plain loop, resume bit for bit, divergence, dead features, scale."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import (
    MODERN,
    PAPER,
    QUICK,
    ROWS,
    D,
    K,
    M,
    N,
    Planted,
    activations,
    expander,
    interrupted,
    log_of,
    same,
    state,
)  # fmt: skip
from torch import Tensor

from expander_sae.data.sources import TensorSource
from expander_sae.mask import Mask
from expander_sae.ops import SparseCode
from expander_sae.sae import SAE
from expander_sae.training import TrainConfig, Trainer, TrainingDiverged, train
from expander_sae.training.checkpoint import Checkpoint
from expander_sae.training.dead import FeatureUse
from expander_sae.training.log import TrainingLog
from expander_sae.training.losses import aux_error

# The recipe


def test_the_defaults_are_the_papers() -> None:
    config = TrainConfig()
    assert (config.steps, config.batch_size, config.lr, config.lr_final, config.clip_norm) == (
        5000,
        256,
        3e-4,
        1e-5,
        1.0,
    )
    assert (config.resample_every, config.resample_below, config.warmup_steps, config.aux_k) == (1000, 5, 0, 0)
    assert (config.b_dec_init, config.scale_activations) == ("zero", False)
    assert config.lr_at(0) == 3e-4
    assert config.lr_at(2500) == pytest.approx((3e-4 + 1e-5) / 2)
    assert config.lr_at(4999) == pytest.approx(1e-5, rel=1e-5)
    assert config.lr_at(5000) == pytest.approx(1e-5, rel=1e-12)


def test_the_schedule_is_one_cosine_period_after_the_warm_up() -> None:
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=200, eta_min=1e-5)
    config, warm = TrainConfig(steps=200), TrainConfig(steps=200, warmup_steps=10)
    for step in range(200):
        expected = cosine.get_last_lr()[0]
        assert config.lr_at(step) == pytest.approx(expected, rel=1e-9)
        assert warm.lr_at(step) == pytest.approx(expected * min(1, (step + 1) / 10), rel=1e-9)
        optimiser.step()
        cosine.step()


def plain_loop(sae: SAE, h: Tensor, config: TrainConfig) -> list[float]:
    """The paper's recipe on an explicit dense masked matrix: losses, and the weights in ``sae``."""
    mask = sae.dictionary.mask.to_dense().double()  # type: ignore[union-attr]
    w = torch.nn.Parameter(sae.dictionary.matrix().to_dense().detach().double())
    b_enc, b_dec = torch.nn.Parameter(torch.zeros(N).double()), torch.nn.Parameter(torch.zeros(M).double())
    optimiser = torch.optim.Adam([w, b_enc, b_dec], lr=config.lr, betas=(0.9, 0.999), eps=1e-8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps, config.lr_final)
    batches = TensorSource(h).batches(config.batch_size, config.seed)
    losses = []
    for _ in range(config.steps):
        batch = next(batches)
        unit = w * mask / (w * mask).norm(dim=0)
        z = (batch - b_dec) @ unit + b_enc
        x = z * torch.zeros_like(z).scatter(1, z.topk(K, dim=1).indices, 1.0)
        loss = (batch - x @ unit.T - b_dec).pow(2).sum(dim=1).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w, b_enc, b_dec], 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        sae.dictionary.values.copy_((w * mask).T.gather(1, sae.dictionary.rows.long()))  # type: ignore[union-attr]
        sae.encoder.b_enc.copy_(b_enc)
        sae.b_dec.copy_(b_dec)
    return losses


def test_the_loop_is_the_papers_recipe(tmp_path: Path) -> None:
    h = activations(dtype=torch.float64)
    config = TrainConfig(steps=40, batch_size=32, log_every=8, resample_every=0, lr=1e-2, lr_final=1e-3)
    ours = expander().double()
    with torch.no_grad():  # the plain loop's parameter is the masked matrix, which starts at unit norm
        ours.dictionary.values.copy_(ours.dictionary.matrix().values)  # type: ignore[union-attr]
    plain = copy.deepcopy(ours)
    losses = plain_loop(plain, h, config)
    variance = float((h - h.mean(dim=0)).square().sum(dim=1).mean())
    train(ours, TensorSource(h), config, tmp_path)
    for name, tensor in state(plain).items():
        torch.testing.assert_close(state(ours)[name], tensor, rtol=1e-6, atol=1e-8)
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [8, 16, 24, 32, 40]
    for number, line in enumerate(lines):
        part = slice(8 * number, 8 * number + 8)
        assert line["loss"] == pytest.approx(sum(losses[part]) / 8, rel=1e-6)
        assert line["fvu"] == pytest.approx(sum(losses[part]) / 8 / variance, rel=1e-6)
        assert line["lr"] == config.lr_at(line["step"] - 1)
    assert lines[-1]["fvu"] < lines[0]["fvu"]


@pytest.mark.parametrize("kind", ["expander", "untied", "dense", "pursuit", "bfloat16"])
def test_every_variant_learns(kind: str) -> None:
    sae = {
        "expander": lambda: expander(relu=True),
        "untied": lambda: expander(untied=True),
        "dense": lambda: SAE.dense(M, N, k=K, untied=True),
        "pursuit": lambda: expander().with_encoder("omp"),
        "bfloat16": lambda: expander().bfloat16(),
    }[kind]()
    h = activations()
    config = replace(MODERN, aux_k=0 if kind == "pursuit" else 5, steps=80)
    dtype = sae.dtype
    train(sae, TensorSource(h), config)
    assert (h - sae(h)).square().sum() < 0.5 * (h - h.mean(dim=0)).square().sum()
    assert sae.dtype == dtype


def test_the_result_does_not_hang_on_torchs_global_generator() -> None:
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        sae = expander()
        before = torch.random.get_rng_state()
        train(sae, TensorSource(activations()), PAPER)
        assert torch.equal(torch.random.get_rng_state(), before)
        results.append(state(sae))
    assert same(*results)


def test_the_seed_orders_the_batches() -> None:
    saes = [expander() for _ in range(2)]
    for seed, sae in enumerate(saes):
        train(sae, TensorSource(activations()), replace(QUICK, seed=seed))
    assert not same(state(saes[0]), state(saes[1]))


def test_the_largest_seed_resamples_too() -> None:
    train(expander(), TensorSource(activations()), replace(PAPER, seed=2**64 - 1, steps=10))


# What is written


def test_the_folder_holds_the_sae_as_it_is_in_memory(tmp_path: Path) -> None:
    sae = expander()
    sae.metadata["trained_on"] = {"layer": 3, "skip_positions": (0,)}
    summary = train(sae, TensorSource(activations()), MODERN, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.safetensors",
        "config.json",
        "log.jsonl",
        "sae.safetensors",
    ]
    again = SAE.from_pretrained(tmp_path)
    assert same(state(again), state(sae))
    assert again.metadata["training"] == json.loads(json.dumps(summary))
    assert summary["config"]["lr"] == MODERN.lr
    assert (summary["rows"], summary["tokens_seen"]) == (ROWS, 30 * 32)
    assert summary["seconds"] > 0


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(expander(), TensorSource(activations()), QUICK)
    assert not list(tmp_path.iterdir())


def test_the_fvu_of_the_log_is_a_fraction_of_the_whole_sets_variance(tmp_path: Path) -> None:
    h = activations()
    train(expander(), TensorSource(h), replace(QUICK, batch_size=1), tmp_path)
    variance = float((h - h.mean(dim=0)).square().sum(dim=1).mean())
    for line in log_of(tmp_path):
        assert line["fvu"] == pytest.approx(line["loss"] / variance, rel=1e-4)


def test_activations_that_are_all_equal_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to learn"):
        train(expander(), TensorSource(torch.ones(64, M)), QUICK)


# Resume


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[TrainConfig, tuple[dict[str, Tensor], list[dict[str, Any]]]]:
    """Weights and log of runs that were never interrupted."""
    results = {}
    for config in (PAPER, MODERN):
        folder, sae = tmp_path_factory.mktemp("whole"), expander(untied=True)
        train(sae, TensorSource(activations()), config, folder)
        results[config] = state(sae), log_of(folder)
    return results


@pytest.mark.parametrize("config", [PAPER, MODERN], ids=["paper", "modern"])
@pytest.mark.parametrize("at", [0, 1, 6, 7, 10, 11, 16, 28, 29])
def test_an_interrupted_run_ends_bit_for_bit_as_if_it_had_not_been(
    config: TrainConfig, at: int, tmp_path: Path, whole
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(expander(untied=True), interrupted(at), config, tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "sae.safetensors").exists()
    sae = expander(untied=True, seed=99)  # where it starts does not matter any more
    train(sae, TensorSource(activations()), config, tmp_path)
    assert same(state(sae), whole[config][0])
    assert same(state(SAE.from_pretrained(tmp_path)), whole[config][0])
    assert log_of(tmp_path) == whole[config][1]


@pytest.mark.parametrize(
    "make", [lambda: SAE.dense(M, N, k=K, untied=True), lambda: expander().with_encoder("omp")], ids=["dense", "omp"]
)
def test_other_kinds_resume_bit_for_bit_too(make: Callable[[], SAE], tmp_path: Path) -> None:
    config, ends = replace(PAPER, scale_activations=True), []
    for at in (None, 4, 19):
        folder = tmp_path / str(at)
        if at is not None:
            with pytest.raises(KeyboardInterrupt):
                train(make(), interrupted(at), config, folder)
        sae = make()
        train(sae, TensorSource(activations()), config, folder)
        ends.append((state(sae), log_of(folder)))
    for end, log in ends[1:]:
        assert same(end, ends[0][0])
        assert log == ends[0][1]


def test_interrupted_again_and_again(tmp_path: Path, whole) -> None:
    for at in (3, 4, 12, 25):
        with pytest.raises(KeyboardInterrupt):
            train(expander(untied=True), interrupted(at), PAPER, tmp_path)
    sae = expander(untied=True)
    train(sae, TensorSource(activations()), PAPER, tmp_path)
    assert same(state(sae), whole[PAPER][0])
    assert log_of(tmp_path) == whole[PAPER][1]


@pytest.mark.parametrize("config", [PAPER, MODERN], ids=["paper", "modern"])
@pytest.mark.parametrize("at", [5, 15, 24])
def test_a_crash_costs_the_steps_since_the_last_checkpoint(config: TrainConfig, at: int, tmp_path: Path, whole) -> None:
    class Crash(Exception):
        pass

    def crash(_batch: Tensor) -> None:
        raise Crash

    with pytest.raises(Crash):
        train(expander(untied=True), Planted(at, crash), config, tmp_path)
    sae = expander(untied=True)
    seen: list[int] = []
    source = Planted(at, lambda _batch: seen.append(at))
    train(sae, source, config, tmp_path)
    assert seen == [at]
    assert same(state(sae), whole[config][0])
    assert log_of(tmp_path) == whole[config][1]


def test_a_log_from_beyond_the_checkpoint_is_cut(tmp_path: Path, whole) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(expander(untied=True), interrupted(15), PAPER, tmp_path)
    log = TrainingLog(tmp_path / "log.jsonl", 30, None, {})
    log.write({"step": 21, "loss": -1.0})
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 2')
    train(expander(untied=True), TensorSource(activations()), PAPER, tmp_path)
    assert log_of(tmp_path) == whole[PAPER][1]


def test_a_finished_run_is_not_trained_again(tmp_path: Path, whole) -> None:
    train(expander(untied=True), TensorSource(activations()), MODERN, tmp_path)
    sae = expander(untied=True)

    def refuse(_batch: Tensor) -> None:
        raise AssertionError("a batch was read")

    summary = train(sae, Planted(0, refuse), MODERN, tmp_path)
    assert same(state(sae), whole[MODERN][0])
    assert log_of(tmp_path) == whole[MODERN][1]
    assert summary["seconds"] > 0


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    def twice(_gradient: Tensor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    sae = expander()
    sae.b_dec.register_hook(twice)
    with pytest.raises(KeyboardInterrupt):
        train(sae, TensorSource(activations()), QUICK, tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_an_interrupted_sae_is_usable_as_far_as_it_got() -> None:
    h, sae = activations(), expander()
    with pytest.raises(KeyboardInterrupt):
        train(sae, interrupted(25), MODERN)
    assert (h - sae(h)).square().sum() < (h - h.mean(dim=0)).square().sum()


@pytest.mark.parametrize(
    ("sae", "config", "message"),
    [
        (expander(), replace(PAPER, lr=2e-2, seed=4), r"train\.lr was 0\.01 and is 0\.02; train\.seed was 0 and is 4"),
        (expander(relu=True), PAPER, r"sae\.sparsity\.relu was False and is True"),
        (expander().double(), PAPER, r"sae\.dtype was 'torch.float32' and is 'torch.float64'"),
        (
            SAE.expander(Mask.build("left-regular", d_in=M, d_sae=N, degree=D, seed=2), K),
            PAPER,
            r"mask\.seed was 1 and is 2",
        ),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(sae: SAE, config: TrainConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(expander(), interrupted(15), PAPER, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        train(sae, TensorSource(activations()), config, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    train(sae, TensorSource(activations()), config, tmp_path, restart=True)


def test_other_activations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(expander(), interrupted(15), PAPER, tmp_path)
    with pytest.raises(ValueError, match=f"rows was {ROWS} and is 400"):
        train(expander(), TensorSource(activations(400)), PAPER, tmp_path)


def test_restart_discards_the_checkpoint_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(expander(), interrupted(15), PAPER, tmp_path)
    seen: list[bool] = []
    source = Planted(0, lambda _batch: seen.append((tmp_path / "checkpoint.safetensors").exists()))
    fresh = expander()
    train(fresh, source, PAPER, tmp_path, restart=True)
    assert seen == [False]
    alone = expander()
    train(alone, TensorSource(activations()), PAPER)
    assert same(state(fresh), state(alone))


# Divergence


@pytest.mark.parametrize("at", [2, 13, 14, 22, 29])
def test_nan_stops_with_step_tail_and_checkpoint(at: int, tmp_path: Path) -> None:
    def plant(batch: Tensor) -> Tensor:
        return batch.index_fill(0, torch.tensor([3]), math.nan)

    with pytest.raises(TrainingDiverged) as caught:
        train(expander(), Planted(at, plant), QUICK, tmp_path)
    message = str(caught.value)
    assert f"at step {at + 1} the loss is not finite" in message
    logged = [line["step"] for line in log_of(tmp_path)]
    assert logged == [step for step in (7, 14, 21, 28) if step <= at]
    assert re.findall(r"(\d+): ", message.split("(step: loss)")[1]) == [str(step) for step in logged]
    assert "none logged yet" in message or logged
    assert "Try a lower lr" in message
    assert not (tmp_path / "sae.safetensors").exists()
    kept = tmp_path / "checkpoint.safetensors"
    assert (str(kept) in message) == kept.exists() == (at > 11)
    if kept.exists():
        saved = Checkpoint.peek(kept)
        assert all(torch.isfinite(tensor).all() for tensor in saved.tensors.values())
        assert saved.numbers["step"] <= at


@pytest.mark.parametrize("at", [9, 20, 29])
@pytest.mark.parametrize("folder", [True, False])
def test_weights_that_overflow_while_the_loss_does_not_reach_no_checkpoint(
    at: int, folder: bool, tmp_path: Path
) -> None:
    sae = expander()
    steps: list[int] = []

    def overflow(gradient: Tensor) -> Tensor:
        steps.append(len(steps))
        return gradient * math.nan if steps[-1] == at else gradient

    sae.b_dec.register_hook(overflow)
    with pytest.raises(
        TrainingDiverged, match=r"by step .* (b_dec|dictionary.values).* hold NaN|at step .* not finite"
    ):
        train(sae, TensorSource(activations()), replace(QUICK, checkpoint_every=1), tmp_path if folder else None)
    assert len(steps) <= at + (2 if folder else QUICK.log_every)
    if folder:
        saved = Checkpoint.peek(tmp_path / "checkpoint.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in saved.tensors.values())
        assert not (tmp_path / "sae.safetensors").exists()


def test_a_loss_far_above_its_start_stops_too(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingDiverged,
        match=r"from step 15 to 21 the loss is [\d.e+]+ times its start, [\d.e+]+ times the variance"
        r" of the activations. Logged before .*: 7: .*, 14: ",
    ):
        train(expander(), Planted(16, lambda batch: 1000 * batch), QUICK, tmp_path)
    assert [line["step"] for line in log_of(tmp_path)] == [7, 14]


def test_a_run_that_diverges_by_itself() -> None:
    with pytest.raises(TrainingDiverged):
        train(
            expander(unit_norm=False), TensorSource(activations()), replace(QUICK, lr=100.0, steps=200, clip_norm=1e9)
        )


# Dead features


def with_dead(features: list[int], sae: SAE | None = None) -> SAE:
    sae = sae or expander()
    with torch.no_grad():
        sae.encoder.b_enc[features] = -1e4
    return sae


def test_resampling_aims_features_that_fired_too_rarely_at_residuals_on_their_supports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dead = [2, 9, 17]
    sae = with_dead(dead)
    calls: list[tuple[list[int], Tensor, Tensor]] = []
    batches = TensorSource(activations()).batches(32, 0)
    residuals = []

    def spy(self: SAE, features: Tensor, targets: Tensor, norm: float) -> None:
        original(self, features, targets, norm)
        calls.append((features.tolist(), targets, self.dictionary.to_dense()[:, features]))

    def step(self: Trainer, number: int) -> None:
        h = next(batches)
        residuals.append(h - sae(h))
        original_step(self, number)

    original, original_step = SAE.reset_features, Trainer.step
    monkeypatch.setattr(SAE, "reset_features", spy)
    monkeypatch.setattr(Trainer, "step", step)
    config = replace(QUICK, steps=20, resample_every=10, resample_below=1)
    train(sae, TensorSource(activations()), config)
    assert len(calls) == 1  # after step 10; after the last step it would be untrained
    features, targets, columns = calls[0]
    assert set(dead) <= set(features)
    mask = sae.dictionary.mask.to_dense()  # type: ignore[union-attr]
    for position, feature in enumerate(features):
        distance = (residuals[9] - targets[position]).norm(dim=1)
        assert distance.min() < 1e-4
        aimed = targets[position] * mask[:, feature]
        torch.testing.assert_close(columns[:, position], aimed / aimed.norm())
    assert (sae.encoder.b_enc[dead].abs() < 100).all()


def test_fires_are_counted_between_resamplings() -> None:
    sae = with_dead([2, 9])
    trainer = Trainer(sae, TensorSource(activations()), replace(PAPER, resample_below=10**6))
    counts = torch.zeros(N, dtype=torch.int64)
    idle = torch.zeros(N, dtype=torch.int64)
    batches = TensorSource(activations()).batches(32, 0)
    for step in range(5):
        code = sae.encode(next(batches))
        fired = torch.bincount(code.indices[code.values != 0].flatten(), minlength=N)
        counts += fired
        idle = torch.where(fired > 0, 0, idle + 32)
        trainer.step(step)
    assert trainer.use.fires.dtype == trainer.use.idle_tokens.dtype == torch.int64
    assert torch.equal(trainer.use.fires, counts)
    assert torch.equal(trainer.use.idle_tokens, idle)
    assert trainer.use.fires[[2, 9]].tolist() == [0, 0]
    assert trainer.use.idle_tokens[[2, 9]].tolist() == [160, 160]


def test_resampling_revives_dead_features(tmp_path: Path) -> None:
    dead = {}
    for every in (0, 10):
        sae = with_dead([2, 9, 17, 20])
        config = replace(QUICK, steps=60, resample_every=every, resample_below=1, dead_after=300)
        summary = train(sae, TensorSource(activations()), config, tmp_path / str(every))
        dead[every] = summary["dead"]
        assert log_of(tmp_path / str(every))[-1]["dead"] == summary["dead"]
        code = sae.encode(activations())
        fired = set(code.indices[code.values != 0].tolist())
        assert ({2, 9, 17, 20} <= fired) == (every > 0)
    assert dead[0] >= 4
    assert dead[10] < dead[0]


def test_a_dictionary_dead_for_the_greater_part_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> None:
        raise AssertionError("resampled")

    monkeypatch.setattr(SAE, "reset_features", refuse)
    train(expander(), TensorSource(activations()), replace(PAPER, resample_below=10**6))  # all are "dead"


@pytest.mark.parametrize("untied", [False, True])
def test_the_auxk_gradient_reaches_dead_features_only(untied: bool) -> None:
    sae = expander(untied=untied).double()
    config = replace(MODERN, aux_k=2, dead_after=50, aux_coefficient=0.25)
    trainer = Trainer(sae, TensorSource(activations(dtype=torch.float64)), config)
    dead = [2, 9, 17]
    trainer.use.idle_tokens[dead] = 51
    trainer.use.idle_tokens[4] = 50  # not yet
    h = activations(20, torch.float64)
    residual = (h - sae(h)).detach()
    found = trainer.use.dead(config.dead_after)
    assert found is not None
    assert found.tolist() == dead
    loss = config.aux_coefficient * aux_error(sae, h, residual, found, config.aux_k)
    loss.backward()

    w = sae.dictionary.to_dense()[:, dead]
    z = (h - sae.b_dec).detach() @ w + sae.encoder.b_enc.detach()[dead]
    x = z * torch.zeros_like(z).scatter(1, z.topk(2, dim=1).indices, 1.0)
    expected = 0.25 * (residual - x @ w.T).square().sum(dim=1).mean()
    torch.testing.assert_close(loss.detach(), expected)

    per_feature = [sae.dictionary.values, sae.encoder.b_enc]
    if untied:
        per_feature.append(sae.encoder.values)
    for parameter in per_feature:
        touched = (parameter.grad.reshape(N, -1) != 0).any(dim=1)
        assert touched.nonzero().flatten().tolist() == dead


def test_dead_features_are_found_as_if_looked_for_every_step() -> None:
    """The lower bound that spares the looks: random codes, one feature at a time silent for long."""
    generator = torch.Generator().manual_seed(3)
    use, plain = FeatureUse(N, torch.device("cpu")), torch.zeros(N, dtype=torch.int64)
    looks = 0
    for step in range(400):
        indices = torch.stack([torch.randperm(N, generator=generator)[:K] for _ in range(8)]).int()
        values = torch.ones(8, K)
        values[indices == step // 60] = 0.0  # empty slots
        code = SparseCode(indices, values)
        use.count(code)
        fired = torch.bincount(indices[values != 0].flatten(), minlength=N) > 0
        plain = torch.where(fired, 0, plain + 8)
        expected = (plain > 200).nonzero().flatten()
        found = use.dead(200)
        assert (found is None) == (not len(expected))
        assert found is None or torch.equal(found, expected)
        looks += found is not None
    assert 0 < looks < 400


def test_auxk_revives_dead_features() -> None:
    dead = {}
    for aux_k in (0, 5):
        sae = with_dead([2, 9, 17, 20])
        with torch.no_grad():
            sae.encoder.b_enc[[2, 9, 17, 20]] = -8.0
        config = replace(QUICK, steps=150, lr=5e-2, aux_k=aux_k, aux_coefficient=1.0, dead_after=100)
        dead[aux_k] = train(sae, TensorSource(activations()), config)["dead"]
    assert dead[5] < dead[0]


# Scale and start


def test_training_on_scaled_activations_is_training_on_activations_that_were_scaled() -> None:
    h = activations(dtype=torch.float64)
    scale = math.sqrt(M / float((h - h.mean(dim=0)).square().sum(dim=1).mean()))
    inside, outside = expander(untied=True).double(), expander(untied=True).double()
    train(inside, TensorSource(h), MODERN)
    train(outside, TensorSource(h * scale), replace(MODERN, scale_activations=False))
    torch.testing.assert_close(inside.dictionary.to_dense(), outside.dictionary.to_dense())
    torch.testing.assert_close(inside.b_dec * scale, outside.b_dec)
    torch.testing.assert_close(inside(h), outside(h * scale) / scale)


def test_the_scale_does_not_show_in_the_log(tmp_path: Path) -> None:
    losses = {}
    for factor in (1.0, 1000.0):
        train(
            expander().double(), TensorSource(activations(dtype=torch.float64) * factor), MODERN, tmp_path / str(factor)
        )
        losses[factor] = [line["loss"] for line in log_of(tmp_path / str(factor))]
    assert losses[1000.0] == pytest.approx([loss * 1e6 for loss in losses[1.0]])


def test_b_dec_starts_at_the_mean() -> None:
    h, sae = activations(), expander()
    train(sae, TensorSource(h), replace(MODERN, steps=1, lr=1e-12))
    torch.testing.assert_close(sae.b_dec.detach(), h.mean(dim=0))


def test_equal_activations_cannot_be_scaled() -> None:
    with pytest.raises(ValueError, match="all sampled activations are equal"):
        train(expander(), TensorSource(torch.ones(50, M)), MODERN)


# Bad input


def test_activations_of_another_width() -> None:
    with pytest.raises(ValueError, match=f"the activations have width 5, the SAE reads d_in = {M}"):
        train(expander(), TensorSource(torch.ones(50, 5)), QUICK)


def test_too_few_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be from 1 to the number of rows, 20, not 32"):
        train(expander(), TensorSource(activations(20)), QUICK, tmp_path)


def test_auxk_for_a_pursuit_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="set aux_k=0"):
        train(expander().with_encoder("omp"), Planted(0, lambda _batch: pytest.fail("started")), MODERN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"checkpoint_every": -1}, "checkpoint_every must be at least 1"),
        ({"dead_after": 0}, "dead_after must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"aux_k": -1}, "aux_k must not be negative"),
        ({"aux_coefficient": -0.1}, "aux_coefficient must not be negative"),
        ({"lr": 0.0}, "lr and clip_norm must be positive"),
        ({"clip_norm": 0.0}, "lr and clip_norm must be positive"),
        ({"lr": math.nan}, "lr"),
        ({"lr": math.inf}, "lr must be finite"),
        ({"lr_final": math.nan}, "lr_final must be finite"),
        ({"clip_norm": math.inf}, "clip_norm must be finite"),
        ({"b_dec_init": "median"}, "b_dec_init must be 'zero' or 'mean', got 'median'"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)
