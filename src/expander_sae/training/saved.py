"""What a run leaves on disk: its folder, and an SAE out of whatever it has come to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expander_sae import files
from expander_sae.dictionary import basis_from
from expander_sae.sae import SAE, SAEFolderError
from expander_sae.sae.folder import CONFIG_NAME
from expander_sae.stored import Section
from expander_sae.training.checkpoint import CHECKPOINT_NAME, Checkpoint
from expander_sae.training.config import TrainConfig

RECIPE_NAME = "recipe.yaml"


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder.
        identity: of the run, see :meth:`~expander_sae.training.trainer.Trainer.identity`.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.checkpoint = Checkpoint(path / CHECKPOINT_NAME, identity)

    def accept(self, restart: bool, replace: bool) -> None:
        """Make sure that the run may end in this folder; ``restart`` discards the checkpoint.

        Raises:
            ValueError: an SAE without a checkpoint would be lost, and neither ``restart`` nor ``replace`` allows it.
        """
        if restart:
            self.checkpoint.path.unlink(missing_ok=True)
        elif not replace and (self.path / CONFIG_NAME).exists() and not self.checkpoint.path.exists():
            raise ValueError(
                f"{self.path} holds an SAE and no checkpoint to continue from: choose another out folder, `restart` "
                "to train anew in its place, or `--from` it to train it further"
            )

    def state(self, config: TrainConfig) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The checkpoint's state, if there is one. A finished run may be asked for more steps than it was planned for.

        Raises:
            ValueError: unreadable, or of another run.
        """
        state = self.checkpoint.load()
        if state is None:
            return None
        done, planned = state[1]["step"], state[1]["steps"]
        if planned == config.steps:
            return state
        if done < planned or config.steps < done:
            finished = "" if done < planned else " and is finished"
            raise ValueError(
                f"{self.checkpoint.path} belongs to another run: train.steps was {planned} and is {config.steps}. It "
                f"has done {done} steps{finished}. Use the same settings to continue it, more steps to make a finished "
                "run longer, another out folder, or restart to discard it."
            )
        print(
            f"{self.path}: a finished run of {planned:,} steps goes on to {config.steps:,}. From step {done + 1:,} the "
            f"learning rate is that of a schedule of {config.steps:,} steps ({config.lr_at(done):.3g} now), so the "
            "result is not that of a run planned so long.",
            file=sys.stderr,
        )
        return state

    def has(self, sae: SAE) -> bool:
        """Whether the folder holds this very SAE; it then takes over the metadata stored there (metrics, notes)."""
        try:
            stored = SAE.from_pretrained(self.path)
        except SAEFolderError:
            return False
        ours, theirs = ({name: t.cpu() for name, t in one.state_dict().items()} for one in (sae, stored))
        if ours.keys() != theirs.keys() or not all(_equal(ours[name], theirs[name]) for name in ours):
            return False
        if "training" not in stored.metadata:
            return False
        sae.metadata, sae.certificate = stored.metadata, stored.certificate
        return True


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def is_checkpoint(place: str | Path) -> bool:
    """Whether ``place`` is a checkpoint file, or the folder of a run that has one and no finished SAE yet."""
    return checkpoint_of(place) is not None


def checkpoint_of(place: str | Path) -> Path | None:
    """The checkpoint file that :func:`load_sae` would read, or ``None`` if it would read an SAE folder."""
    path = files.user_path(place)
    if path.is_file():
        return path
    inside = path / CHECKPOINT_NAME
    return inside if inside.is_file() and not (path / CONFIG_NAME).exists() else None


def load_sae(place: str | Path, *, device: str | torch.device | None = None) -> SAE:
    """An SAE from an SAE folder, a Hub id, a checkpoint file, or the folder of an unfinished run.

    Raises:
        ValueError: (also as ``SAEFolderError``) what is there is damaged; see :meth:`SAE.from_pretrained`.
        HubError: there is nothing there, and the Hub has none of that name or is out of reach.
    """
    checkpoint = checkpoint_of(place)
    if checkpoint is None:
        return SAE.from_pretrained(files.user_path(place) if files.user_path(place).exists() else place, device=device)
    return sae_from_checkpoint(checkpoint).to(device=device)


def sae_from_checkpoint(path: str | Path) -> SAE:
    """The SAE as far as the run of that checkpoint had come, for activations as they are; in evaluation mode.

    Its metadata have ``trained_on`` and a ``training`` summary, whose ``steps`` were done of ``config.steps``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: unreadable or altered; the message names the file.
    """
    saved = Checkpoint.peek(path)
    state = {name.removeprefix("sae."): t for name, t in saved.tensors.items() if name.startswith("sae.")}
    try:
        config, scale = saved.numbers["sae"], saved.numbers["scale"]
        explicit = config["dictionary"].get("mask", {}).get("kind") == "explicit"
        sae = SAE.from_config(config, dict(_stored(state, explicit)))
        sae.load_state_dict(state)
        if saved.numbers["basis"] is not None:
            basis = basis_from(Section(saved.numbers["basis"], "basis"), saved.tensors, sae.d_in)
        else:
            basis = None
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the checkpoint {path} holds no SAE that this program can rebuild: {error}") from None
    sae.rescale_(scale)
    sae.enter_basis_(basis)
    return sae


def _stored(state: dict[str, Tensor], explicit: bool) -> list[tuple[str, Tensor]]:
    """Names and shapes as an SAE folder has them: the dictionary's without prefix, supports only if none redraws them,
    a single number as a vector."""
    named = []
    for name, tensor in state.items():
        short = name.removeprefix("dictionary.")
        if short.endswith("_extra_state") or (short == "rows" and not explicit):
            continue
        named.append((short, tensor.clone().reshape(tensor.shape or (1,))))
    return named
