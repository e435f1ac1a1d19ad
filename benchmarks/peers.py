"""Other projects, called as their own documentation says. Each is optional; see README.md for what to install."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Shape
from expander_sae.sae import SAE, BatchTopK, Gated, JumpReLU, TiedEncoder
from expander_sae.sae.sparsity import Adapted

NOT_INSTALLED = "not installed"
_DISTRIBUTIONS = ("sae-lens", "scikit-learn", "spams-bin", "orthogonal-matching-pursuit-gpu")

Codes = Callable[[], Any]  # what is timed: its answer in the peer's own form


def module(name: str) -> Any | None:
    """The module, or ``None`` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def versions() -> dict[str, str]:
    """Peers that are installed."""
    found = {}
    for name in _DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def limit_threads(threads: int) -> None:
    """Hold NumPy's BLAS to ``threads``; without threadpoolctl no peer uses it."""
    if (pools := module("threadpoolctl")) is not None:
        pools.threadpool_limits(threads)


def saelens_step(shape: Shape, like: SAE, h: Tensor, *, sparse: bool) -> Callable[[], float]:
    """SAELens' step without its logging and firing counts, from the columns and biases of ``like``."""
    saes = importlib.import_module("sae_lens.saes")
    config = saes.TopKTrainingSAEConfig(
        d_in=shape.d_in,
        d_sae=shape.d_sae,
        k=shape.k,
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,  # the two together fail in the backward pass, seen in 6.54.12
        apply_b_dec_to_input=True,
    )
    return _saelens(saes.TopKTrainingSAE(config), like, h, {})


def saelens_rule_step(like: SAE, h: Tensor) -> Callable[[], float]:
    """SAELens' step of the same sparsity rule, likewise, with its thresholds and the coefficient it has now."""
    saes = importlib.import_module("sae_lens.saes")
    rule, sizes = like.sparsity, {"d_in": like.d_in, "d_sae": like.d_sae, "apply_b_dec_to_input": True}
    if isinstance(rule, BatchTopK):
        config = saes.BatchTopKTrainingSAEConfig(**sizes, k=rule.k, use_sparse_activations=False)
        return _saelens(saes.BatchTopKTrainingSAE(config), like, h, {})
    assert isinstance(rule, Adapted)
    per_value, per_feature = (float(rule.strength * rule.scale**power) for power in (1, 2))
    if isinstance(rule, JumpReLU):
        config = saes.JumpReLUTrainingSAEConfig(**sizes, jumprelu_bandwidth=float(rule.window))
        return _saelens(saes.JumpReLUTrainingSAE(config), like, h, {"l0": per_feature})
    if isinstance(rule, Gated):
        return _saelens(saes.GatedTrainingSAE(saes.GatedTrainingSAEConfig(**sizes)), like, h, {"l1": per_value})
    return _saelens(saes.StandardTrainingSAE(saes.StandardTrainingSAEConfig(**sizes)), like, h, {"l1": per_value})


def _saelens(sae: Any, like: SAE, h: Tensor, coefficients: dict[str, float]) -> Callable[[], float]:
    """Steps of ``sae`` from the columns, biases and thresholds of ``like``; each returns its whole loss."""
    inputs = importlib.import_module("sae_lens.saes.sae")
    encoder, rule = like.encoder, like.sparsity
    assert isinstance(encoder, TiedEncoder)
    columns = like.dictionary.to_dense()
    with torch.no_grad():
        sae.W_enc.copy_(columns)
        sae.W_dec.copy_(columns.T)
        (sae.b_gate if isinstance(rule, Gated) else sae.b_enc).copy_(encoder.b_enc)
        sae.b_dec.copy_(like.b_dec)
        if isinstance(rule, Gated):
            sae.r_mag.copy_(rule.r_mag)
            sae.b_mag.copy_(rule.b_mag)
        if isinstance(rule, JumpReLU):
            sae.threshold.copy_(rule.threshold)
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-4)
    step_input = inputs.TrainStepInput(
        sae_in=h, coefficients=coefficients, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )

    def step() -> float:
        output = sae.training_forward_pass(step_input)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return float(output.loss.detach())

    return step


def sklearn_omp(h: Tensor, dense: Tensor, k: int, dtype: type[np.floating]) -> Codes:
    """scikit-learn's ``orthogonal_mp_gram``; the Gram matrix is made beforehand and costs it nothing."""
    linear_model = importlib.import_module("sklearn.linear_model")
    samples, columns = h.numpy().astype(dtype), dense.numpy().astype(dtype)
    gram = np.asfortranarray(columns @ columns.T)
    return lambda: linear_model.orthogonal_mp_gram(gram, columns @ samples.T, n_nonzero_coefs=k)


def spams_omp(h: Tensor, dense: Tensor, k: int, dtype: type[np.floating], threads: int) -> Codes:
    """SPAMS' ``omp``, which selects as orthogonal least squares does."""
    spams = importlib.import_module("spams")
    samples, columns = (np.asfortranarray(tensor.numpy().T.astype(dtype)) for tensor in (h, dense))
    # Without eps it now and then returned codes that were empty.
    return lambda: spams.omp(samples, columns, L=k, eps=0.0, numThreads=threads)


def batched_omp(h: Tensor, dense: Tensor, k: int, algorithm: str) -> Codes:
    """orthogonal-matching-pursuit-gpu; the Gram matrix is made beforehand and costs it nothing."""
    package = importlib.import_module("orthogonal_matching_pursuit_gpu.omp")
    columns = dense.T.contiguous()
    gram = dense @ columns
    solve = {"naive": package.omp_naive, "v0": package.omp_v0}[algorithm]
    return lambda: solve(columns, h, n_nonzero_coefs=k, XTX=gram)


def code_of(answer: Any, k: int) -> tuple[Tensor, Tensor]:
    """Any peer's answer as ``indices`` and ``values``, both ``(B, k)``; fewer features are padded with zeros."""
    if isinstance(answer, tuple):  # orthogonal-matching-pursuit-gpu: sets, solutions (B, k, 1), lengths
        return answer[0], answer[1].reshape(answer[0].shape)
    full = answer.toarray() if hasattr(answer, "toarray") else np.asarray(answer)
    codes = torch.from_numpy(np.ascontiguousarray(full.T))  # (B, n)
    indices = codes.abs().topk(k).indices
    return indices, codes.gather(1, indices)
