"""Other projects' fused TopK encoders on the GPU, against ours: same matrix, same activations, answers compared first.

Neither project is on the package index. Check them out into one folder and name it, ``gpu_check.py --peers FOLDER``:

* ``github.com/rodrgo/expander-sae``, the paper's own code: a Triton gather-reduce that writes ``(B, n)`` in float32,
  then ``torch.topk``. Called as its source (commit 598f59a) defines it. Its autotuner compiles 36 kernels for each new
  ``m``, ``n``, ``d``, so the first call is long, longest at degree 30.
* ``github.com/alepot55/flash-sae``: a fused dense TopK encoder, ``topk(relu(h @ W_enc + b_enc))``. Its source was not
  at hand when this was written: it is called as its project page describes, and a row says so if it does not fit.

A checkout is known by a file in it, so its folder may have any name. ``flash_sae`` may also be installed. What is
missing gets a row ``absent`` that says why.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_run import Run, Shape, close, times
from expander_sae import ops
from expander_sae.ops import Selection, SparseCode, reference

Encode = Callable[[], tuple[Tensor, Tensor]]  # indices and values, (B, k) each
AUTHORS_FILE = "kernels/triton/encoder_fwd_v3.py"
FLASH_FILE = "flash_sae/__init__.py"


class Absent(Exception):
    """A peer that cannot be timed, and why."""


@dataclass(frozen=True)
class Problem:
    """What every contender encodes: ``h (B, m)``, ``rows`` and ``values (n, d)``, ``bias (n,)``, the ``k`` largest."""

    h: Tensor
    rows: Tensor
    values: Tensor
    bias: Tensor
    k: int

    def ours(self) -> SparseCode:
        return ops.encode(self.h, self.rows, self.values, self.bias, Selection(self.k), backend="triton")


@dataclass(frozen=True)
class Peer:
    """A contender: its name, the one type it is timed in, and how its encoder is made ready for a problem."""

    name: str
    dtype: torch.dtype
    build: Callable[[Path | None, Problem], Encode]


def checkout(folder: Path | None, marker: str) -> Path:
    """The folder that holds ``marker``: ``folder`` itself or one directly in it.

    Raises:
        Absent: no folder was named, or none holds it.
    """
    if folder is None:
        raise Absent(f"no folder was named with --peers; it should hold a checkout with {marker}")
    for root in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        if (root / marker).is_file():
            return root
    raise Absent(f"no {marker} in {folder.name} or in a folder of it")


def authors_encoder(folder: Path | None, problem: Problem) -> Encode:
    """The paper's gather-reduce kernel and ``torch.topk``."""
    (n, d), batch = problem.rows.shape, problem.h.shape[0]
    path = checkout(folder, AUTHORS_FILE) / AUTHORS_FILE
    if batch * n >= 2**31:
        raise Absent(f"its kernel counts scores in 32 bits; B·n = {batch * n}")
    # By its path: on sys.path the checkout's "kernels" would hide another package of that name.
    module = load_file("authors_encoder_fwd_v3", path)
    values, rows = problem.values.reshape(-1).contiguous(), problem.rows.reshape(-1).contiguous()

    def encode() -> tuple[Tensor, Tensor]:
        scores = module.encoder_forward_v3(problem.h, values, rows, problem.bias, n, d)
        found = torch.topk(scores, problem.k, dim=1)
        return found.indices, found.values

    return encode


def flash_encoder(folder: Path | None, problem: Problem) -> Encode:
    """flash-sae's encoder, with the same matrix held dense."""
    module = flash_module(folder)
    (n, _), m = problem.rows.shape, problem.h.shape[1]
    model = module.SparseAutoencoder(d_model=m, n_features=n, k=problem.k).to(problem.h.device, problem.h.dtype)
    weight = reference.to_dense(problem.rows, problem.values, m)  # (m, n)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "b_enc":
                parameter.copy_(problem.bias)
            elif parameter.ndim == 1:
                parameter.zero_()  # a bias taken off the input
        model.W_enc.copy_(weight if model.W_enc.shape == weight.shape else weight.T)

    def encode() -> tuple[Tensor, Tensor]:
        pair = [item for item in model.encode(problem.h) if isinstance(item, Tensor)][:2]
        indices, values = sorted(pair, key=torch.is_floating_point)
        return indices, values

    return encode


PEERS = (
    Peer("rodrgo/expander-sae gather-reduce + torch.topk", torch.float32, authors_encoder),
    Peer("alepot55/flash-sae fused encoder", torch.bfloat16, flash_encoder),
)


def flash_module(folder: Path | None) -> ModuleType:
    """``flash_sae`` from a checkout or, without one, as installed."""
    try:
        root = checkout(folder, FLASH_FILE)
    except Absent:
        if importlib.util.find_spec("flash_sae") is None:
            raise
    else:
        sys.path.insert(0, str(root))
    return importlib.import_module("flash_sae")


def load_file(name: str, path: Path) -> ModuleType:
    """A module from one file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def disagreement(answer: tuple[Tensor, Tensor], ours: SparseCode, problem: Problem) -> str:
    """Empty when a peer's code is as good as ours: other features are right where scores are equal but for rounding.

    Its values must be those of its features, distinct ones, and as large as ours, place by place.
    """
    indices, values = answer
    if indices.shape != ours.indices.shape or values.shape != indices.shape:
        return f"indices {tuple(indices.shape)} and values {tuple(values.shape)}, not {tuple(ours.indices.shape)}"
    if bool((indices < 0).any()) or bool((indices >= problem.rows.shape[0]).any()):
        return "an index outside the dictionary"
    if bool((indices.sort(dim=1).values.diff(dim=1) == 0).any()):
        return "a feature appears twice"
    dtype = problem.h.dtype
    scores = reference.correlate_at(problem.h, indices.to(torch.int32), problem.rows, problem.values)
    if error := close(values, scores + problem.bias[indices.long()], dtype):
        return f"values that are not those of its features: {error}"
    if error := close(values.sort(dim=1, descending=True).values, ours.values, dtype):
        return f"not the largest scores: {error}"
    return ""


def time_peers(run: Run, folder: Path | None, shapes: list[Shape], batch: int, peers: tuple[Peer, ...] = PEERS) -> None:
    """Every peer at every shape, in its own type; ``ratio`` is its time over ours in that type."""
    for shape in shapes:
        m, n, d, k = shape
        rows, h = run.rows(m, n, d), run.normal(batch, m, dtype=torch.float32)
        values, bias = run.normal(n, d, dtype=torch.float32, seed=1), 0.1 * run.normal(n, dtype=torch.float32, seed=2)
        values = values / values.norm(dim=1, keepdim=True)
        half = Problem(h.bfloat16(), rows, values.bfloat16(), bias.bfloat16(), k)
        for peer in peers:
            name = f"m={m} n={n} d={d} k={k} B={batch} {str(peer.dtype)[6:]}"
            problem = half if peer.dtype == torch.bfloat16 else Problem(h, rows, values, bias, k)
            with run.guarded("peers", f"{peer.name} {name}"), torch.no_grad():
                entry = {"case": name, "peer": peer.name}
                run.note("peers", entry | compare(run, peer, folder, problem, half))


def compare(run: Run, peer: Peer, folder: Path | None, problem: Problem, half: Problem) -> dict[str, Any]:
    """One row. A peer that cannot be had or called is absent; one that answers otherwise than ours is a failure."""
    try:
        encode = peer.build(folder, problem)
        begin = time.perf_counter()
        answer = encode()
        first = time.perf_counter() - begin
    except Absent as why:
        return {"absent": str(why)}
    except Exception as error:  # anything may go wrong in code that is not ours
        return {"absent": f"it is there but could not be called: {type(error).__name__}: {error}"[:400]}
    if wrong := disagreement(answer, problem.ours(), problem):
        run.failures += 1
        return {"wrong": wrong}
    batch = problem.h.shape[0]
    entry: dict[str, Any] = {"same_codes": True, "first_call_s": round(first, 2)}
    entry |= times("peer", run.time(encode), batch) | times("ours", run.time(problem.ours), batch)
    entry |= {"peer_extra_bytes": run.peak(encode), "ours_extra_bytes": run.peak(problem.ours)}
    entry["ratio"] = round(entry["peer_ms"] / entry["ours_ms"], 2)
    if problem is not half:
        entry |= times("ours_bfloat16", run.time(half.ours), batch)
        entry["ratio_to_ours_bfloat16"] = round(entry["peer_ms"] / entry["ours_bfloat16_ms"], 2)
    return entry
