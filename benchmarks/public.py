"""What users call against the kernels underneath: ``sae.encode``, ``sae(h)``, and ``train`` on a store on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Shape, activations, expander_sae
from benchmarks.checks import same_tensor
from benchmarks.encode import encoder_parts
from benchmarks.measure import Race, Row, Settings
from benchmarks.step import loop_step
from expander_sae.data import ActivationStore, StoreMeta, StoreWriter
from expander_sae.ops import Selection
from expander_sae.training import train
from expander_sae.training.recipe import resolve

KERNEL = "kernel"
BARE_STEP = "bare step"
TIMED_PRESETS = ("paper", "modern", "pursuit")

_STEPS = 200  # of a training run that is timed
_STORED_BATCHES = 20


def run(shape: Shape, settings: Settings) -> list[Row]:
    """Encoding, then training with each preset; the answers of encoding are compared with the kernel's."""
    return _encoding(shape, settings) + _training(shape, settings)


@torch.no_grad()
def _encoding(shape: Shape, settings: Settings) -> list[Row]:
    race = Race("public", shape, settings)
    h, sae = activations(shape.d_in, settings.batch), expander_sae(shape).eval()
    matrix, b_enc = encoder_parts(sae)
    centred, selection = h - sae.b_dec, Selection(shape.k, 0.0)
    samples = settings.batch
    code = race.enter(KERNEL, lambda: partial(matrix.select, centred, b_enc, selection), samples=samples, ours=True)
    public = race.enter("sae.encode", lambda: partial(sae.encode, h), samples=samples)
    assert code is not None
    assert public is not None
    same_tensor("codes of sae.encode", public.to_dense(shape.d_sae), code.to_dense(shape.d_sae))
    race.enter("sae(h), encode and decode", lambda: partial(sae, h), samples=samples)
    return race.rows()


def _training(shape: Shape, settings: Settings) -> list[Row]:
    race = Race("public", shape, settings)
    h = activations(shape.d_in, settings.batch)
    race.enter(BARE_STEP, lambda: loop_step(expander_sae(shape), h), samples=settings.batch, ours=True)
    with _store(shape, settings.batch) as store:
        for preset in TIMED_PRESETS:
            build = partial(_run, shape, settings.batch, store, preset)
            race.enter(f"train, preset {preset}", build, samples=settings.batch * _STEPS)
        return race.rows()


def _run(shape: Shape, batch: int, store: ActivationStore, preset: str) -> Callable[[], dict[str, Any]]:
    """A whole run, loading, scaling, counting and logging included, without checkpoints."""
    sizes = {"d_sae": shape.d_sae, "degree": shape.degree, "k": shape.k}
    recipe = resolve({"preset": preset, **sizes, "steps": _STEPS, "batch_size": batch, "dead_after": 10**9})
    return lambda: train(recipe.sae.build(shape.d_in), store, recipe.train)


@contextmanager
def _store(shape: Shape, batch: int) -> Iterator[ActivationStore]:
    rows = batch * _STORED_BATCHES
    meta = StoreMeta("synthetic", None, "none", "residual", 0, shape.d_in, "bfloat16", "none", 256)
    with tempfile.TemporaryDirectory() as folder:
        with StoreWriter(Path(folder) / "store", meta, expected_rows=rows) as writer:
            for number in range(_STORED_BATCHES):
                h: Tensor = activations(shape.d_in, batch)
                positions = torch.arange(batch) + number
                writer.append(h, positions, positions, cursor=None)
        yield ActivationStore.open(Path(folder) / "store")
