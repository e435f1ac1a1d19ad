"""Evaluations of one SAE after another run the model without an SAE once, and come out the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.lm import tiny_lm

from expander_sae.evaluation import SharedPasses, evaluate_in_model, in_model
from expander_sae.sae import SAE


def test_evaluations_one_after_another_share_the_model_without_an_sae(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    windows = list(torch.randint(2, 60, (5, 12), generator=torch.Generator().manual_seed(3)))
    saes = {name: SAE.dense(lm.d_model, 40, k=3, seed=seed) for seed, name in enumerate("ab")}
    together = evaluate_in_model(saes, lm, windows, 1)
    read: list[int] = []
    real = in_model.Intervention.read
    monkeypatch.setattr(
        in_model.Intervention, "read", lambda self, tokens: read.append(len(tokens)) or real(self, tokens)
    )
    shared = SharedPasses()
    for name, sae in saes.items():
        (alone,) = evaluate_in_model({name: sae}, lm, windows, 1, shared=shared).values()
        assert replace(alone, seconds=0.0) == replace(together[name], seconds=0.0)
    assert read == [4, 1]  # once, in batches of four
    for changed in ({"layer": 2}, {"convention": "saelens"}, {"max_norm_multiple": 1.2}, {"windows": windows[::-1]}):
        arguments: dict[str, Any] = {"windows": windows, "layer": 1} | changed
        found = evaluate_in_model(saes, lm, shared=shared, **arguments)
        expected = evaluate_in_model(saes, lm, **arguments)
        assert found["a"].ce_recon == expected["a"].ce_recon, changed
        assert found["a"].left_alone == expected["a"].left_alone, changed
