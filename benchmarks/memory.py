"""Memory and time at a width where a dense SAE does not fit: each task in a process of its own.

``python -m benchmarks.memory TASK SIZES BATCH THREADS REPEATS`` is that process; it prints one JSON object.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Shape, activations, expander_sae
from benchmarks.checks import same_number, same_topk
from benchmarks.encode import encoder_parts, scores_of
from benchmarks.measure import Row, Settings, memory
from benchmarks.step import loop_step, loss_of
from expander_sae.files import human_bytes
from expander_sae.ops import Selection

_CHECKED = 4  # samples compared with the reference, after the peak is read
_STEPS_OF_A_RUN = 5000  # what TrainConfig takes by default
_TIED_STATES = 4  # weights, gradient, two moments


def run(shape: Shape, settings: Settings) -> list[Row]:
    """Peak memory of the whole process, Python and PyTorch included, of an encode and of training steps."""
    rows = []
    for task in ("encode", "step"):
        found = _in_child(task, shape, settings)
        row = Row("memory", str(shape), f"expander, {task}", True, settings.batch, found["seconds"], found["peak"])
        note = f"{human_bytes(found['before'])} of it before any work; {found['check']}"
        if task == "step":
            hours = _STEPS_OF_A_RUN * row.per_sample * settings.batch / 3600
            note += f"; {_STEPS_OF_A_RUN} steps: {hours:.2f} h"
        rows.append(replace(row, note=note))
    weights, tied = human_bytes(shape.dense_bytes), human_bytes(_TIED_STATES * shape.dense_bytes)
    return [
        *rows,
        Row("memory", str(shape), "dense, encode", note=f"computed: one copy of the weights {weights}"),
        Row("memory", str(shape), "dense, step", note=f"computed: tied, at least {tied}"),
    ]


def _in_child(task: str, shape: Shape, settings: Settings) -> dict[str, Any]:
    size = f"{shape.d_in}x{shape.d_sae}x{shape.degree}x{shape.k}"
    numbers = [str(number) for number in (settings.batch, settings.threads, settings.repeats)]
    command = [sys.executable, "-m", "benchmarks.memory", task, size, *numbers]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _work(task: str, shape: Shape, batch: int, repeats: int) -> dict[str, Any]:
    before = memory("VmRSS")
    h = activations(shape.d_in, batch)
    sae = expander_sae(shape)
    if task == "encode":
        matrix, b_enc = encoder_parts(sae)
        work = lambda: matrix.select(h, b_enc, Selection(shape.k))  # noqa: E731
    else:
        work = loop_step(sae, h)
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    peak = memory("VmHWM")
    few = h[:_CHECKED]
    with torch.no_grad():
        if task == "encode":
            matrix, b_enc = encoder_parts(sae)
            check = same_topk("expander", matrix.select(few, b_enc, Selection(shape.k)), scores_of(few, matrix, b_enc))
        else:
            loss = float(loss_of(sae, few))
            os.environ["EXPANDER_SAE_BACKEND"] = "reference"
            same_number("expander", loss, float(loss_of(sae, few)), 1e-4)
            check = "loss is the reference's"
    return {"before": before or 0, "peak": peak or math.nan, "seconds": seconds, "check": check}


if __name__ == "__main__":
    _task, _size, _batch, _threads, _repeats = sys.argv[1:]
    torch.set_num_threads(int(_threads))
    print(json.dumps(_work(_task, Shape.parse(_size), int(_batch), int(_repeats))))
