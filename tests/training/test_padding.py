"""Masks whose columns differ in degree: padding is 0 whatever is done to the dictionary, and nothing counts it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from expander_sae import pursuit
from expander_sae.data import TensorSource
from expander_sae.dictionary import ExpanderDictionary
from expander_sae.mask import Mask
from expander_sae.sae import SAE, SAEConfig, SAEFolderError, UntiedEncoder
from expander_sae.training import Trainer, train
from expander_sae.training.exact import refit_dictionary
from expander_sae.training.recipe import resolve

M, N, D, K = 16, 40, 4, 3
MASK = Mask.build("bernoulli", d_in=M, d_sae=N, degree=D, seed=1)
HELD = torch.as_tensor(MASK.held)
SMALL = {"d_sae": N, "degree": D, "k": K, "mask": "bernoulli", "batch_size": 32, "steps": 60, "seed": 1}


def activations(rows: int = 300) -> Tensor:
    return torch.randn(rows, M, generator=torch.Generator().manual_seed(0))


def expander(sae: SAE) -> ExpanderDictionary:
    assert isinstance(sae.dictionary, ExpanderDictionary)
    return sae.dictionary


def padding_is_zero(sae: SAE) -> bool:
    held = expander(sae).held
    assert held is not None
    assert bool((~held).any())
    return not bool(expander(sae).values[~held].any())


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"resample_every": 10, "resample_below": 20},
    "modern": {"dead_after": 40, "aux_k": 8},
    "pursuit": {"resample_every": 10, "resample_below": 20},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_training_leaves_padding_at_zero(preset: str) -> None:
    recipe = resolve({"preset": preset} | SMALL | PRESETS[preset])
    sae = recipe.sae.build(M)
    before = expander(sae).values.detach().clone()
    summary = train(sae, TensorSource(activations()), recipe.train)
    assert padding_is_zero(sae)
    assert bool((expander(sae).values != before)[HELD].float().mean() > 0.9)
    assert (summary["resampled"] > 0) == (preset != "modern")
    norms = sae.dictionary.matrix().norms()
    torch.testing.assert_close(norms, torch.ones(N))


def test_the_gradient_at_padding_is_zero_in_the_fused_call_and_outside_it() -> None:
    for rule in ("topk", "batch-topk"):
        sae = SAEConfig(mask="bernoulli", d_sae=N, degree=D, k=K, sparsity=rule, seed=1).build(M)
        sae.squared_error(activations()).error.backward()
        gradient = expander(sae).values.grad
        assert gradient is not None
        assert not bool(gradient[~HELD].any())
        assert bool(gradient[HELD].any())


def test_a_padded_dictionary_is_the_dense_one_with_its_zeros() -> None:
    sae = SAE.expander(MASK, K, seed=3)
    dense = sae.dictionary.to_dense()
    assert torch.equal(dense != 0, MASK.to_dense())
    h = activations(20)
    torch.testing.assert_close(sae.dictionary.matrix().correlate(h), h @ dense)
    with torch.no_grad():
        sae.dictionary.values.add_((~HELD).float())  # whoever writes there
    assert torch.equal(sae.dictionary.to_dense() != 0, MASK.to_dense())


@pytest.mark.parametrize("solver", pursuit.SOLVERS)
def test_pursuits_read_it(solver: str) -> None:
    sae = SAE.expander(MASK, K, seed=3)
    code = pursuit.solver(solver)(activations(20), sae.dictionary.matrix().detach(), K)
    assert bool(torch.isfinite(code.values).all())


def test_values_are_counted_and_stored_without_padding(tmp_path: Path) -> None:
    sae = SAE.expander(MASK, K, seed=3)
    entries = int(HELD.sum())
    assert sae.num_values == entries == MASK.num_entries < MASK.rows.numel()
    assert sae.dictionary.num_bytes == 4 * entries
    sae.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "sae.safetensors")
    assert stored["values"].shape == (entries,)
    assert sae.num_bytes == sum(tensor.nbytes for tensor in stored.values())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_values"] == entries
    assert config["dictionary"]["mask"]["degree"] == D
    same(sae, SAE.from_pretrained(tmp_path))


def same(one: SAE, other: SAE) -> None:
    assert expander(one).mask.sha256 == expander(other).mask.sha256
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_supports_may_be_moved_and_are_stored_then(tmp_path: Path) -> None:
    sae, width = SAE.expander(MASK, K, seed=3), MASK.degree
    before = expander(sae).mask
    rows = torch.arange(width).flip(0).expand(2, width)
    held = torch.arange(width) < torch.tensor([[2], [5]])  # the largest rows, which come first
    expander(sae).move(torch.tensor([4, 9]), rows, torch.ones(2, width), held)
    moved = expander(sae).mask
    assert moved.counts[[4, 9]].tolist() == [2, 5]
    assert sae.dictionary.to_dense()[:, 4].nonzero().flatten().tolist() == [width - 2, width - 1]
    assert padding_is_zero(sae)
    assert before.sha256 == MASK.sha256
    assert sae.num_values == moved.num_entries == int(moved.counts.sum())
    sae.save_pretrained(tmp_path)
    assert sae.num_bytes == sum(tensor.nbytes for tensor in load_file(tmp_path / "sae.safetensors").values())
    assert expander(sae).support_bytes == 2 * MASK.rows.numel()
    same(sae, SAE.from_pretrained(tmp_path))
    expander(sae).move(torch.arange(N), torch.arange(width).expand(N, width), torch.ones(N, width))
    assert sae.num_values == N * width


def test_a_regular_dictionary_may_become_one(tmp_path: Path) -> None:
    regular = Mask.build("balanced", d_in=M, d_sae=N, degree=D)
    sae, fresh = SAE.expander(regular, K), SAE.expander(regular, K, seed=1)
    held = torch.tensor([[True, True, False, False]])
    expander(sae).move(torch.tensor([3]), torch.tensor([[1, 4, 6, 9]]), torch.ones(1, D), held)
    assert sae.num_values == N * D - 2
    fresh.load_state_dict(sae.state_dict())
    same(sae, fresh)
    sae.save_pretrained(tmp_path)
    same(sae, SAE.from_pretrained(tmp_path))
    fresh.load_state_dict(SAE.expander(regular, K).state_dict())
    assert expander(fresh).held is None


def test_a_resumed_run_ends_bit_for_bit_the_same() -> None:
    recipe = resolve({"preset": "modern"} | SMALL)
    runs = []
    for cut in (None, 25):
        sae = recipe.sae.build(M)
        trainer = Trainer(sae, TensorSource(activations()), recipe.train)
        trainer.initialise()
        for step in range(cut or recipe.train.steps):
            trainer.step(step)
        if cut is not None:
            tensors, numbers = trainer.state()
            data, kept = save({name: tensor.contiguous() for name, tensor in tensors.items()}), json.dumps(numbers)
            sae = replace(recipe.sae, seed=2).build(M)  # another mask: the state brings its own
            trainer = Trainer(sae, TensorSource(activations()), recipe.train)
            with pytest.raises(RuntimeError, match="size mismatch"):
                trainer.restore((load(data), json.loads(kept)))
            sae = recipe.sae.build(M)
            trainer = Trainer(sae, TensorSource(activations()), recipe.train)
            for step in range(trainer.restore((load(data), json.loads(kept))), recipe.train.steps):
                trainer.step(step)
        trainer.finish()
        runs.append(sae)
    same(*runs)
    assert padding_is_zero(runs[1])


def test_the_exact_update_solves_for_the_entries_there_are() -> None:
    """Row by row: the least squares over the columns that hold the row."""
    source = TensorSource(activations())
    sae = SAE.expander(MASK, K, seed=3, unit_norm=False)
    dense = sae.encode(activations()).to_dense(N)
    ridge, old = 1e-2, sae.dictionary.to_dense()
    h = activations()
    refit_dictionary(sae, source, ridge=ridge)
    assert padding_is_zero(sae)
    energy = dense.square().sum(dim=0)
    weight = ridge * energy[energy > 0].mean()
    centred, target = dense - dense.mean(dim=0), h - h.mean(dim=0)
    found = sae.dictionary.to_dense()
    for row in range(M):
        columns = MASK.to_dense()[row].nonzero().flatten()
        x = centred[:, columns].double()
        right = x.T @ (target[:, row].double() - x @ old[row, columns].double())
        change = torch.linalg.solve(x.T @ x + weight * torch.eye(len(columns), dtype=torch.float64), right)
        torch.testing.assert_close(found[row, columns].double(), old[row, columns] + change, atol=1e-4, rtol=1e-3)


def test_an_encoder_with_values_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="untied encoder has values of its own and needs as many rows in every column"):
        SAE.expander(MASK, K, untied=True)
    sae = SAE.expander(MASK, K)
    with pytest.raises(ValueError, match="bernoulli, is read by a tied encoder or a pursuit"):
        SAE(sae.dictionary, UntiedEncoder(sae.dictionary.values.detach().clone()), sae.sparsity)


def test_values_that_do_not_fit_are_refused_before_a_mask_is_drawn(tmp_path: Path) -> None:
    sae = SAE.expander(MASK, K)
    config, tensors = sae.config(), dict(sae.dictionary.stored_tensors()) | {"b_dec": sae.b_dec.detach()}
    tensors["encoder.b_enc"] = torch.zeros(N)
    SAE.from_config(json.loads(json.dumps(config)), tensors)
    for values, message in [
        (tensors["values"][:-1], r"should be floating point of shape \(\d+,\)"),
        (tensors["values"][: N - 1], "has 39 entries for 40 columns of 1 to 16 rows"),
        (torch.zeros(N, D), r"should be floating point of shape \(\d+,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            SAE.from_config(json.loads(json.dumps(config)), tensors | {"values": values})
    sae.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(SAEFolderError, match="altered"):
        SAE.from_pretrained(tmp_path)
