"""Going on: from a trained SAE, from a checkpoint, beyond the planned steps; what travels with the SAE."""

from __future__ import annotations

import math
import os
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
from expander_sae.files import FolderInUse, folder_lock
from expander_sae.mask import Mask
from expander_sae.sae import SAE, BatchTopK
from expander_sae.training import Stopped, Trainer, TrainingDiverged, load_sae, sae_from_checkpoint, train
from expander_sae.training.checkpoint import Checkpoint


class Known(TensorSource):
    """Activations that know where they come from."""

    def origin(self) -> dict[str, Any]:
        return {"model": "toy", "layer": 3, "skip_positions": (0,)}


def fvu(sae: SAE, h: Tensor) -> float:
    return float((h - sae(h)).detach().square().sum() / (h - h.mean(dim=0)).square().sum())


KINDS: dict[str, Callable[[], SAE]] = {
    "expander": expander,
    "relu": lambda: expander(relu=True),
    "untied": lambda: expander(untied=True),
    "stored supports": lambda: SAE.expander(Mask.from_rows(expander().dictionary.mask.rows, M), K),  # type: ignore[union-attr]
    "dense": lambda: SAE.dense(M, N, k=K, untied=True),
    "pursuit": lambda: expander().with_encoder("omp"),
    "batch-topk": lambda: expander(sparsity=BatchTopK(N, K)),
    "float64": lambda: expander().double(),
}


# From a trained SAE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [PAPER, MODERN], ids=["paper", "modern"])
def test_a_step_of_no_length_changes_nothing(kind: str, config: Any, tmp_path: Path) -> None:
    h, sae = activations(), KINDS[kind]()
    config = replace(config, aux_k=config.aux_k if sae.encoder.ranks_features else 0)
    train(sae, TensorSource(h), replace(config, steps=80, lr=5e-2), tmp_path)
    before = fvu(sae, h)
    assert sae.b_dec.any()
    again = SAE.from_pretrained(tmp_path)
    train(again, TensorSource(h), replace(config, steps=1, lr=1e-9, lr_final=0.0, warmup_steps=0))
    # The threshold of batch-topk moves with every batch, whatever the learning rate.
    assert fvu(again, h) == pytest.approx(before, rel=2e-2 if kind == "batch-topk" else 1e-3)
    assert not again.training


def test_training_further_learns_further() -> None:
    h, sae = activations(), expander(relu=True)
    train(sae, TensorSource(h), MODERN)
    before, first = fvu(sae, h), sae.metadata["training"]
    summary = train(sae, TensorSource(h), replace(MODERN, steps=90))
    assert fvu(sae, h) < before
    assert summary["continues"] == first
    assert summary["fvu"] == pytest.approx(fvu(sae, h), rel=0.3)


def test_figures_from_before_are_dropped() -> None:
    sae = expander()
    sae.metadata |= {"metrics": {"fvu": 0.1}, "note": "mine"}
    train(sae, TensorSource(activations()), QUICK)
    assert "metrics" not in sae.metadata
    assert sae.metadata["note"] == "mine"


def test_a_b_dec_that_was_set_is_not_overwritten() -> None:
    h, sae = activations(), expander()
    with torch.no_grad():
        sae.b_dec.fill_(0.25)
    train(sae, TensorSource(h), replace(MODERN, steps=1, lr=1e-12))
    torch.testing.assert_close(sae.b_dec.detach(), torch.full((M,), 0.25))


# What travels


def test_the_origin_travels(tmp_path: Path) -> None:
    sae = expander()
    train(sae, Known(activations()), QUICK, tmp_path)
    assert sae.metadata["trained_on"] == {"model": "toy", "layer": 3, "skip_positions": (0,)}
    assert SAE.from_pretrained(tmp_path).metadata["trained_on"]["model"] == "toy"


def test_a_source_without_an_origin_gives_its_size() -> None:
    sae = expander()
    train(sae, TensorSource(activations()), QUICK)
    assert sae.metadata["trained_on"] == {"d_in": M, "rows": ROWS}
    sae.metadata["trained_on"] = {"model": "told by hand"}
    train(sae, TensorSource(activations()), QUICK)
    assert sae.metadata["trained_on"] == {"model": "told by hand"}


def test_the_origin_is_part_of_a_runs_identity(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(expander(), interrupted(15), PAPER, tmp_path)
    with pytest.raises(ValueError, match=r"trained_on\.model was None and is 'toy'"):
        train(expander(), Known(activations()), PAPER, tmp_path)


def test_looking_closer_is_no_other_run(tmp_path: Path) -> None:
    whole, cut = expander(), expander()
    train(whole, TensorSource(activations()), PAPER)
    with pytest.raises(KeyboardInterrupt):
        train(expander(), interrupted(15), PAPER, tmp_path)
    train(cut, TensorSource(activations()), replace(PAPER, log_every=2, checkpoint_every=3), tmp_path)
    assert same(state(cut), state(whole))
    assert [line["step"] for line in log_of(tmp_path)][-3:] == [26, 28, 30]


# Longer than planned


def test_a_finished_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    h, short = activations(), expander()
    train(short, TensorSource(h), replace(MODERN, steps=30), tmp_path)
    capsys.readouterr()
    longer = expander()
    summary = train(longer, TensorSource(h), replace(MODERN, steps=50), tmp_path)
    assert "goes on to 50. From step 31 the learning rate is that of a schedule of 50 steps" in capsys.readouterr().err
    assert (summary["steps"], summary["longer_than_planned"]) == (50, [30])
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [7, 14, 21, 28, 30, 35, 42, 49, 50]
    assert [line["lr"] for line in lines[5:]] == [replace(MODERN, steps=50).lr_at(step) for step in (34, 41, 48, 49)]

    # By hand: the same optimiser, the new schedule.
    sae = expander()
    trainer = Trainer(sae, TensorSource(h), replace(MODERN, steps=30))
    trainer.initialise()
    for step in range(30):
        trainer.step(step)
    second = Trainer(expander(), TensorSource(h), replace(MODERN, steps=50))
    assert second.restore(trainer.state()) == 30
    trainer.finish()
    for step in range(30, 50):
        second.step(step)
    second.finish()
    assert same(state(second.sae), state(longer))

    again = expander()
    train(again, TensorSource(h), replace(MODERN, steps=50), tmp_path)  # finished now: nothing is done
    assert same(state(again), state(longer))


@pytest.mark.parametrize("steps", [20, 40])
def test_other_steps_of_an_unfinished_run_are_refused(steps: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(expander(), interrupted(25), PAPER, tmp_path)
    with pytest.raises(ValueError, match=rf"train\.steps was 30 and is {steps}. It has done \d+ steps. Use the same"):
        train(expander(), TensorSource(activations()), replace(PAPER, steps=steps), tmp_path)


def test_fewer_steps_than_were_done_are_refused(tmp_path: Path) -> None:
    train(expander(), TensorSource(activations()), PAPER, tmp_path)
    with pytest.raises(ValueError, match=r"train\.steps was 30 and is 20. It has done 30 steps and is finished"):
        train(expander(), TensorSource(activations()), replace(PAPER, steps=20), tmp_path)


# What is in the folder


def test_a_finished_run_keeps_what_was_added_to_its_sae(tmp_path: Path) -> None:
    sae = expander()
    train(sae, TensorSource(activations()), QUICK, tmp_path)
    sae.metadata["metrics"] = {"fvu": 0.5}
    sae.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = expander()
    train(again, TensorSource(activations()), QUICK, tmp_path)
    assert again.metadata["metrics"] == {"fvu": 0.5}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_altered_sae_is_made_again_from_the_finished_checkpoint(tmp_path: Path) -> None:
    sae = expander()
    train(sae, TensorSource(activations()), QUICK, tmp_path)
    (tmp_path / "sae.safetensors").write_bytes(b"")
    train(expander(), TensorSource(activations()), QUICK, tmp_path)
    assert same(state(SAE.from_pretrained(tmp_path)), state(sae))


def test_an_sae_without_a_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    expander().save_pretrained(tmp_path)
    before = (tmp_path / "sae.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds an SAE and no checkpoint to continue from: choose another out folder"):
        train(expander(), TensorSource(activations()), QUICK, tmp_path)
    assert (tmp_path / "sae.safetensors").read_bytes() == before
    train(SAE.from_pretrained(tmp_path), TensorSource(activations()), QUICK, tmp_path, replace=True)
    (tmp_path / "checkpoint.safetensors").unlink()
    train(expander(), TensorSource(activations()), QUICK, tmp_path, restart=True)


def test_one_writer_in_a_folder(tmp_path: Path) -> None:
    with folder_lock(tmp_path, "something else is done"), pytest.raises(FolderInUse, match="something else is done"):
        train(expander(), TensorSource(activations()), QUICK, tmp_path)
    train(expander(), TensorSource(activations()), QUICK, tmp_path)


def test_what_killed_runs_left_is_cleared(tmp_path: Path) -> None:
    own = tmp_path / ".checkpoint.safetensors.0123abcd-1-0123abcd.tmp"  # another machine's: the lock is ours
    foreign = tmp_path / ".mine.tmp"
    own.mkdir()
    foreign.mkdir()
    train(expander(), TensorSource(activations()), QUICK, tmp_path)
    assert not own.exists()
    assert foreign.exists()


# From a checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_an_sae(kind: str, tmp_path: Path) -> None:
    sae = KINDS[kind]()
    config = replace(MODERN, aux_k=5 if sae.encoder.ranks_features else 0)
    with pytest.raises(KeyboardInterrupt):
        train(sae, interrupted(25), config, tmp_path)
    for place in (tmp_path, tmp_path / "checkpoint.safetensors"):
        loaded = load_sae(place)
        for name, tensor in state(sae).items():
            torch.testing.assert_close(loaded.state_dict()[name], tensor)
        assert loaded.config() | {"metadata": {}} == sae.config() | {"metadata": {}}
        assert not loaded.training
        assert loaded.metadata["training"]["steps"] < loaded.metadata["training"]["config"]["steps"] == 30
    assert fvu(load_sae(tmp_path), activations()) == pytest.approx(fvu(sae, activations()), rel=1e-5)


def test_supports_that_moved_are_in_the_checkpoint(tmp_path: Path) -> None:
    sae = expander()
    trainer = Trainer(sae, TensorSource(activations()), QUICK)
    trainer.initialise()
    trainer.step(0)
    sae.dictionary.move(torch.tensor([2]), torch.tensor([[0, 3, 5, 7]]), torch.ones(1, 4))  # type: ignore[operator]
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", trainer.identity())
    checkpoint.save(trainer.state())
    trainer.finish()
    assert same(state(sae_from_checkpoint(checkpoint.path)), state(sae))


def test_after_a_cliff_the_last_good_checkpoint_goes_on(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"`train --from` it with a lower lr"):
        train(expander(), Planted(16, lambda batch: 1e4 * batch), QUICK, tmp_path / "cut")
    sae = load_sae(tmp_path / "cut")
    assert sae.metadata["training"]["steps"] == 11
    before = fvu(sae, activations())
    train(sae, TensorSource(activations()), replace(QUICK, lr=1e-3), tmp_path / "further")
    assert fvu(sae, activations()) < before


def test_a_checkpoint_without_an_sae(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(FileNotFoundError):
        sae_from_checkpoint(path)
    Checkpoint(path, {}).save(({}, {"step": 3}))
    with pytest.raises(ValueError, match="holds no SAE that this program can rebuild"):
        load_sae(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        load_sae(path)


def test_what_is_neither(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_sae(tmp_path)


# Divergence


@pytest.mark.parametrize("kind", ["expander", "untied", "dense", "pursuit"])
@pytest.mark.parametrize("lr", [1e6, 1e12, 1e30])
def test_a_learning_rate_far_too_high_is_found_at_the_first_look(kind: str, lr: float, tmp_path: Path) -> None:
    config = replace(QUICK, lr=lr, lr_final=lr, b_dec_init="mean", steps=6, log_every=3)
    with pytest.raises(TrainingDiverged, match=r"times the variance of the activations|not finite|NaN or infinity"):
        train(KINDS[kind](), TensorSource(activations()), config, tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert log_of(tmp_path) == []


def test_an_overflow_in_a_pursuit_is_divergence_and_bad_samples_are_bad_samples() -> None:
    sae = expander().with_encoder("omp")
    trainer = Trainer(sae, TensorSource(activations()), QUICK)
    trainer.initialise()
    trainer.step(0)
    with torch.no_grad():
        sae.b_dec[0] = math.inf
    with pytest.raises(TrainingDiverged, match="by step 2 b_dec hold NaN or infinity"):
        trainer.step(1)
    trainer.finish()

    def plant(batch: Tensor) -> Tensor:
        return batch.index_fill(0, torch.tensor([3]), math.nan)

    with pytest.raises(ValueError, match=r"1 of 32 samples have entries that are not finite"):
        train(expander().with_encoder("omp"), Planted(5, plant), QUICK)


def test_uncentred_activations_may_begin_above_the_guard() -> None:
    h = activations() + 100.0  # FVU at the start: about M · 100² / variance
    sae = expander()
    trainer = Trainer(sae, TensorSource(h), QUICK)
    trainer.initialise()
    trainer.step(0)
    assert trainer.report()["fvu"] > 100
    trainer.finish()


def test_an_end_worse_than_the_mean_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    train(expander(), TensorSource(activations() + 100.0), replace(QUICK, lr=1e-6))
    assert "above 1, the mean of the activations alone would do better" in capsys.readouterr().err
    train(expander(), TensorSource(activations()), replace(QUICK, b_dec_init="mean"))
    assert "above 1" not in capsys.readouterr().err


# Signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_after_the_step_with_a_checkpoint(name: str, tmp_path: Path) -> None:
    number, whole = getattr(signal, name), expander()
    train(whole, TensorSource(activations()), QUICK)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=name) as stopped:
        train(expander(), Planted(15, lambda _batch: os.kill(os.getpid(), number)), QUICK, tmp_path)
    assert stopped.value.signum == number
    assert signal.getsignal(number) is before
    assert load_sae(tmp_path).metadata["training"]["steps"] > 10
    sae = expander()
    train(sae, TensorSource(activations()), QUICK, tmp_path)
    assert same(state(sae), state(whole))


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(expander(), Planted(15, lambda _batch: os.kill(os.getpid(), signal.SIGHUP)), QUICK)
    finally:
        signal.signal(signal.SIGHUP, before)


# Resampling


@pytest.mark.parametrize(("rule", "norm"), [("unit", 1.0), ("inverse-sqrt-degree", 0.5)])
def test_the_norm_of_re_aimed_values(rule: Any, norm: float) -> None:
    sae = expander()
    with torch.no_grad():
        sae.encoder.b_enc[[2, 9]] = -1e4  # type: ignore[index]
    config = replace(QUICK, resample_every=10, resample_below=1, resample_norm=rule, lr=1e-12, steps=11)
    train(sae, TensorSource(activations()), config)
    torch.testing.assert_close(sae.dictionary.values[[2, 9]].norm(dim=1).detach(), torch.full((2,), norm))
    torch.testing.assert_close(sae.dictionary.matrix().norms().detach(), torch.ones(N))


def test_free_columns_are_not_made_shorter() -> None:
    sae = expander(unit_norm=False)
    with torch.no_grad():
        sae.encoder.b_enc[[2, 9]] = -1e4  # type: ignore[index]
    train(sae, TensorSource(activations()), replace(QUICK, resample_every=10, resample_below=1, lr=1e-12, steps=11))
    torch.testing.assert_close(sae.dictionary.values[[2, 9]].norm(dim=1).detach(), torch.ones(2))
