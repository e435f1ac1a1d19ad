"""The measured deviations: ours is the training loop, the author's is his loop written out on dense matrices."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.stores import harvest
from support.training import K, M, N, activations, expander, same, state
from torch import Tensor

from benchmarks import authors_recipe
from benchmarks.authors_recipe import AUTHORS, OURS, Choices, patched, train_as
from expander_sae.data.sources import TensorSource
from expander_sae.mask import Mask
from expander_sae.sae import SAE
from expander_sae.training import TrainConfig, train
from expander_sae.training.recipe import resolve

CONFIG = TrainConfig(steps=24, batch_size=32, resample_every=8, resample_below=40, lr=1e-2, lr_final=1e-3, seed=3)


def written_out(sae: SAE, h: Tensor, config: TrainConfig) -> None:
    """The author's loop on a dense masked parameter, in float64, with the draws that ours would take."""
    mask = sae.dictionary.mask.to_dense().double()  # type: ignore[attr-defined]
    raw = torch.zeros(N, M, dtype=torch.float64)
    raw.scatter_(1, sae.dictionary.rows.long(), sae.dictionary.values.detach())  # type: ignore[attr-defined]
    raw = torch.nn.Parameter(raw.T.contiguous())
    b_enc, b_dec = (torch.nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in (N, M))
    optimiser = torch.optim.Adam([raw, b_enc, b_dec], lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps, config.lr_final)
    draw, fires = torch.Generator().manual_seed(config.seed), torch.zeros(N)

    def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
        w = raw * mask / (raw * mask).norm(dim=0)
        z = (batch - b_dec) @ w + b_enc
        code = torch.zeros_like(z).scatter(1, (top := z.topk(K)).indices, top.values)
        return batch - code @ w.T - b_dec, code

    for step in range(config.steps):
        batch = h[torch.randint(len(h), (config.batch_size,), generator=draw)]
        optimiser.zero_grad()
        forward(batch)[0].square().sum(dim=1).mean().backward()
        torch.nn.utils.clip_grad_norm_([raw, b_enc, b_dec], config.clip_norm)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            residual, code = forward(batch)
            fires += (code != 0).sum(dim=0)
            if (step + 1) % config.resample_every == 0:
                few = (fires < config.resample_below).nonzero().flatten()
                assert 0 < len(few) < 0.8 * N  # or the test would show nothing
                targets = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
                rows = torch.multinomial(residual.square().sum(dim=1), len(few), replacement=True, generator=targets)
                for feature, row in zip(few.tolist(), rows.tolist(), strict=True):
                    aim = residual[row] * mask[:, feature]
                    raw[:, feature] = aim / aim.norm() / mask[:, feature].sum().sqrt()
                    b_enc[feature] = 0
                fires.zero_()
    with torch.no_grad():
        sae.dictionary.values.copy_((raw * mask).T.gather(1, sae.dictionary.rows.long()))  # type: ignore[attr-defined]
        sae.encoder.b_enc.copy_(b_enc)  # type: ignore[attr-defined]
        sae.b_dec.copy_(b_dec)


@pytest.mark.parametrize("b_dec_init", ["zero", "mean"])
def test_without_his_choices_it_is_our_loop_bit_for_bit(b_dec_init: str) -> None:
    config = replace(CONFIG, b_dec_init=b_dec_init)  # type: ignore[arg-type]
    trained, again = expander(), expander()
    summary = train(trained, TensorSource(activations()), config)
    assert train_as(OURS, again, TensorSource(activations()), config) == summary["resampled"] > 0
    assert same(state(trained), state(again))


def test_with_all_his_choices_it_is_the_authors_loop() -> None:
    h, ours = activations(dtype=torch.float64), expander().double()
    his = copy.deepcopy(ours)
    written_out(his, h, CONFIG)
    train_as(AUTHORS, ours, TensorSource(h), CONFIG)
    for name, tensor in state(his).items():
        torch.testing.assert_close(state(ours)[name], tensor, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("choice", ["last_step", "after_update", "with_replacement"])
def test_each_choice_changes_the_result(choice: str) -> None:
    ours, changed = expander(), expander()
    train_as(OURS, ours, TensorSource(activations()), CONFIG)
    train_as(Choices(**{choice: True}), changed, TensorSource(activations()), CONFIG)
    assert not same(state(ours), state(changed))


def test_a_patched_mask_uses_every_row_and_changes_no_more_than_it_must() -> None:
    mask = Mask.build("left-regular", d_in=40, d_sae=30, degree=3, seed=0)
    empty = len(authors_recipe.empty_rows(mask))
    whole = patched(mask, seed=0)
    assert empty > 0
    assert len(authors_recipe.empty_rows(whole)) == 0
    assert whole.degree == 3
    assert empty <= int((whole.rows != mask.rows).any(dim=1).sum()) < 30
    full = Mask.build("left-regular", d_in=8, d_sae=60, degree=3, seed=0)
    assert torch.equal(patched(full, seed=0).rows, full.rows)


def test_the_command_measures_every_arm_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harvest(tmp_path / "store")
    monkeypatch.setattr(authors_recipe, "HELD_OUT", 20)
    sizes = ["--d-sae", "6", "--degree", "1", "--k", "2", "--steps", "2", "--seeds", "0", "1"]
    monkeypatch.setattr(authors_recipe, "resolve", lambda given: resolve(given | {"batch_size": 10}))
    arguments = [str(tmp_path / "store"), str(tmp_path / "out"), "--presets", "paper", *sizes]
    authors_recipe.main(arguments)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, seed) for arm in authors_recipe.ARMS for seed in (0, 1)
    ]
    assert (tmp_path / "out.md").read_text().count("| paper |") == len(authors_recipe.ARMS)
    monkeypatch.setattr(authors_recipe, "measure", lambda *given: pytest.fail("measured again"))
    authors_recipe.main(arguments)
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows
