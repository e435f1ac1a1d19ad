"""Which language model this is: the commit of a Hub model, fingerprints of weights and tokenizer, and comparison."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

_COMMIT = re.compile("[0-9a-f]{40}")
_BLOCK = 2**16
_BLOCKS = 64


class Identified(Protocol):
    """What a language model says of itself."""

    name: str
    revision: str | None
    weights: str | None

    @property
    def tokenizer_hash(self) -> str | None: ...


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit hash, which nothing can move, and not a branch or tag."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def cached_commit(repo: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a Hub model stands for in the local cache, None if it is not there.

    Asked after a file of that revision was loaded: the cache then knows what the Hub answered.
    """
    folder = cached_snapshot(repo, revision)
    return folder.name if folder is not None and is_commit(folder.name) else None


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """Folder of a Hub model's files in the local cache, None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def weights_fingerprint(folder: Path) -> str | None:
    """A hash of a model folder that training on changes: its config, and of each weight file name, size and content.

    Of a file above 4 MiB, 64 blocks of 64 KiB evenly spaced from the first byte to the last stand for the content:
    all of a large model would take minutes. None for a folder without weight files.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    if not files:
        return None
    digest = hashlib.sha256()
    if (config := folder / "config.json").is_file():
        digest.update(config.read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            if size <= _BLOCK * _BLOCKS:
                digest.update(file.read())
                continue
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return f"weights-{digest.hexdigest()[:16]}"


def tokenizer_hash(tokenizer: Any) -> str | None:
    """A hash of a tokenizer's vocabulary and special tokens, None for no tokenizer."""
    if tokenizer is None:
        return None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    facts = json.dumps([tokenizer.get_vocab(), special, sorted(tokenizer.all_special_ids)], sort_keys=True)
    return f"tokenizer-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


def mismatches(origin: Mapping[str, Any], lm: Identified, layer: int, hook: str) -> list[str]:
    """In what the model, the tokenizer and the site differ from those an SAE records; one line for each.

    ``origin``: the SAE's ``metadata["trained_on"]``; what it does not record is not compared. The weights are the
    same if the commits are, or the fingerprints; only where neither is known on both sides do the names decide.
    """
    lines = []
    pairs = [(origin.get("revision"), lm.revision), (origin.get("weights"), lm.weights)]
    # A folder's revision is its fingerprint: it may be compared with that of a Hub model's files.
    pairs += [(origin.get("revision"), lm.weights), (origin.get("weights"), lm.revision)]
    known = [(theirs, ours) for theirs, ours in pairs if theirs and ours]
    if known:
        if all(theirs != ours for theirs, ours in known):
            theirs, ours = known[0]
            lines.append(f"weights: trained on {theirs} of {origin.get('model')}, this is {ours} of {lm.name}")
    elif (name := origin.get("model")) is not None and name != lm.name:
        lines.append(f"model: trained on {name}, this is {lm.name}")
    recorded, found = origin.get("tokenizer_hash"), lm.tokenizer_hash
    if recorded and found and recorded != found:
        lines.append(f"tokenizer: trained with {recorded}, this is {found}")
    for what, value in (("layer", layer), ("hook", hook)):
        if origin.get(what) not in (None, value):
            lines.append(f"{what}: trained on {origin[what]!r}, this is {value!r}")
    return lines
