"""A run: the steps of a :class:`~expander_sae.training.trainer.Trainer` with folder, log, checkpoints and signals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from expander_sae import files
from expander_sae.data.sources import ActivationSource
from expander_sae.progress import progress
from expander_sae.sae import SAE
from expander_sae.training.config import TrainConfig
from expander_sae.training.divergence import TrainingDiverged
from expander_sae.training.interrupt import deferred_signals
from expander_sae.training.log import LOG_NAME, Trackers, TrainingLog
from expander_sae.training.recipe import Recipe
from expander_sae.training.saved import RECIPE_NAME, RunFolder
from expander_sae.training.trainer import Trainer


def train(
    sae: SAE,
    source: ActivationSource,
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    restart: bool = False,
    replace: bool = False,
    trackers: Trackers | None = None,
    description: str = "train",
) -> dict[str, Any]:
    """Train ``sae`` in place on ``source``; returns a summary, also stored in ``sae.metadata["training"]``.

    An SAE that was trained before goes on from where it is, with a new optimiser and schedule.

    With ``out``, the folder gets ``log.jsonl``, a checkpoint every ``checkpoint_every`` steps, and at the end the SAE
    itself. Run again with the same arguments after an interruption, it continues from the checkpoint, and the
    weights come out bit for bit as if it had never stopped (same machine, same number of threads). A finished run asked
    for more ``steps`` goes on, too: from there with the learning rates of the longer schedule, so the result is not
    that of a run planned so long; a line on standard error says so.

    Args:
        sae: moved nowhere; batches follow it to its device and type. In evaluation mode afterwards.
        source: activations of width ``sae.d_in``. What it says of its origin becomes ``sae.metadata["trained_on"]``.
        config: what to do.
        out: folder for log, checkpoints and the result; locked against other writers meanwhile.
        recipe: written to ``out`` as ``recipe.yaml``, once the run is accepted.
        restart: discard a checkpoint instead of continuing from it, and replace an SAE in ``out``.
        replace: replace an SAE in ``out`` that has no checkpoint.
        trackers: where else the log goes.
        description: what the progress bar says.

    Raises:
        ValueError: wrong width, too few rows, AuxK for an encoder that ranks no features, a checkpoint of another
            configuration in ``out``, a damaged log there, or an SAE without a checkpoint (see ``replace``).
        TrainingDiverged: see there.
        Stopped: (a ``KeyboardInterrupt``) after Ctrl-C, SIGTERM or SIGHUP: after the step in progress, with a
            checkpoint written. The SAE is usable as far as it got.
        FolderInUse: another process writes in ``out``.
    """
    trainer = Trainer(sae, source, config)
    if out is None:
        return _run(trainer, None, recipe, trackers, description)
    place = RunFolder(files.user_path(out), trainer.identity())
    with files.folder_lock(place.path, "an SAE is trained"):
        files.remove_leftovers(place.path, locked=True)
        place.accept(restart, replace)
        return _run(trainer, place, recipe, trackers, description)


def _run(
    trainer: Trainer, place: RunFolder | None, recipe: Recipe | None, trackers: Trackers | None, description: str
) -> dict[str, Any]:
    sae, config = trainer.sae, trainer.config
    state = None if place is None else place.state(config)
    if state is None:
        trainer.initialise()
    start = 0 if state is None else trainer.restore(state)
    log: TrainingLog | None = None
    try:
        if place is not None and start == config.steps:
            trainer.finish()
            if place.has(sae):
                return sae.metadata["training"]
        log = TrainingLog(place and place.path / LOG_NAME, start, trackers, trainer.identity())
        if place is not None and recipe is not None:
            files.atomic_write_bytes(place.path / RECIPE_NAME, recipe.to_yaml().encode())
        with progress(description, config.steps, "step", done=start) as advance, deferred_signals() as signals:
            shown = start
            for step in range(start, config.steps):
                trainer.step(step)
                done = step + 1
                if done % config.log_every == 0 or done == config.steps:
                    line = trainer.report()
                    log.write(line)
                    advance(done - shown, note=f"FVU {line['fvu']:.3f}  dead {line['dead']:,}")
                    shown = done
                stop = signals.signum is not None
                if place is not None and (done % config.checkpoint_every == 0 or done == config.steps or stop):
                    trainer.check()
                    place.checkpoint.save(trainer.state())
                signals.raise_if_any()
    except TrainingDiverged as error:
        raise error.explained(log.tail() if log else (), place and place.checkpoint.path) from None
    finally:
        trainer.finish()
        if log is not None:
            log.close()
    sae.metadata["training"] = trainer.summary()
    if place is not None:
        sae.save_pretrained(place.path)
    if (fvu := sae.metadata["training"]["fvu"]) is not None and fvu > 1:
        line = f"{description}: the last FVU is {fvu:.3g}; above 1, the mean of the activations alone would do better."
        print(line, file=sys.stderr)
    return sae.metadata["training"]
