"""A third kind of dictionary is one file: its matrix, its module, its entry. Nothing else asks what kind it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from expander_sae import pursuit
from expander_sae.data import TensorSource
from expander_sae.dictionary import DICTIONARIES, DenseMatrix, Dictionary, Matrix, unit_rows
from expander_sae.evaluation import reconstruction
from expander_sae.ops import Selection, SparseCode
from expander_sae.sae import SAE, PursuitEncoder, TiedEncoder, TopK
from expander_sae.stored import Section, take_tensor
from expander_sae.training import TrainConfig, train
from expander_sae.training.exact import refit_dictionary

M, N, K = 6, 15, 3


@dataclass(frozen=True)
class MirroredMatrix(Matrix):
    """Dense columns read backwards: ``W[i, j] = values[j, m - 1 - i]``."""

    values: Tensor

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.values.shape[1]

    @property
    def plain(self) -> DenseMatrix:
        return DenseMatrix(self.values)

    def correlate(self, h: Tensor) -> Tensor:
        return self.plain.correlate(h.flip(-1))

    def select(self, h: Tensor, b_enc: Tensor | None, selection: Selection, **options: Any) -> SparseCode:
        center = options.pop("center", None)
        options["center"] = None if center is None else center.flip(-1)
        return self.plain.select(h.flip(-1), b_enc, selection, **options)

    def decode(self, code: SparseCode) -> Tensor:
        return self.plain.decode(code).flip(-1)

    def correlate_at(self, h: Tensor, indices: Tensor) -> Tensor:
        return self.plain.correlate_at(h.flip(-1), indices)

    def gram(self, indices: Tensor) -> Tensor:
        return self.plain.gram(indices)

    def columns(self, indices: Tensor) -> Tensor:
        return self.plain.columns(indices).flip(-1)

    def subset(self, features: Tensor) -> Self:
        return replace(self, values=self.values[features])

    def with_values(self, values: Tensor) -> Self:
        return replace(self, values=values)


class MirroredDictionary(Dictionary):
    kind = "mirrored"

    def __init__(self, values: Tensor) -> None:
        super().__init__(values, unit_norm=True)
        self.d_in = values.shape[1]

    def core(self) -> MirroredMatrix:
        return MirroredMatrix(unit_rows(self.values))

    @classmethod
    def from_config(cls, section: Section, tensors: Mapping[str, Tensor], d_in: int, d_sae: int) -> Self:
        return cls(take_tensor(tensors, "values", (d_sae, d_in)))

    def restrict(self, features: Tensor, targets: Tensor) -> Tensor:
        return targets.flip(-1)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DICTIONARIES, "mirrored", MirroredDictionary)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(pursuing: bool) -> tuple[SAE, SAE]:
    """The same SAE with a mirrored and with a dense dictionary; the second is to be given mirrored activations."""
    saes = []
    for dictionary in (MirroredDictionary(normal(N, M)), SAE.dense(M, N, k=K).dictionary):
        with torch.no_grad():
            dictionary.values.copy_(normal(N, M))
        saes.append(SAE(dictionary, PursuitEncoder("omp") if pursuing else TiedEncoder(N), TopK(N, K)))
    return saes[0], saes[1]


@pytest.mark.parametrize("pursuing", [False, True])
def test_it_trains_evaluates_and_is_stored_like_the_others(pursuing: bool, tmp_path: Path) -> None:
    h = normal(400, M, seed=3)
    config = TrainConfig(steps=60, batch_size=64, lr=1e-2, aux_k=0 if pursuing else 2, dead_after=50, resample_every=20)
    mirrored, plain = pair(pursuing)
    train(mirrored, TensorSource(h.flip(1)), config)
    train(plain, TensorSource(h), config)
    torch.testing.assert_close(mirrored(h.flip(1)).flip(1), plain(h), rtol=1e-3, atol=1e-3)
    assert reconstruction(mirrored, TensorSource(h.flip(1))).fvu == pytest.approx(
        reconstruction(plain, TensorSource(h)).fvu, rel=1e-3
    )
    mirrored.save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path)
    assert isinstance(again.dictionary, MirroredDictionary)
    assert torch.equal(again(h), mirrored.eval()(h))


@pytest.mark.parametrize("solver", sorted(set(pursuit.SOLVERS) - set(pursuit.COMBINATORIAL)))
def test_every_pursuit_reads_it(solver: str) -> None:
    mirrored, plain = (sae.double() for sae in pair(True))
    h = normal(20, M, seed=3).double()
    found = pursuit.solver(solver)(h.flip(1), mirrored.dictionary, K)
    expected = pursuit.solver(solver)(h, plain.dictionary, K)
    same = torch.isclose(found.to_dense(N), expected.to_dense(N), rtol=1e-6, atol=1e-6).all(dim=1)
    assert same.double().mean() >= 0.9  # CoSaMP and HTP stop where a residual no longer falls: rounding may decide


def test_the_exact_update_knows_it() -> None:
    mirrored, _ = pair(True)
    h = normal(400, M, seed=3)
    before = reconstruction(mirrored, TensorSource(h.flip(1))).fvu
    refit_dictionary(mirrored, TensorSource(h.flip(1)))
    assert reconstruction(mirrored, TensorSource(h.flip(1))).fvu < before
