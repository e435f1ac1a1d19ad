"""Models with the layers, sizes and texts studied on them."""

from __future__ import annotations

from dataclasses import dataclass

from expander_sae.lm.embedded import EMBEDDED


@dataclass(frozen=True)
class ModelPreset:
    """A model with the layers (0-based; the first is the default), sizes and degrees studied on it.

    ``text`` is the source its activations are harvested from by default.
    """

    hub_id: str
    layers: tuple[int, ...]
    d_sae: int
    k: int
    degrees: tuple[int, ...]
    text: str = "monology/pile-uncopyrighted"


# The paper's four models with its own sizes (arXiv 2607.01799, Section 5 and the author's result files: there
# "layer 3" is the output of block 3 counted from 0, as here), and the embedded model of the demo. Its Pythia models
# are those trained on the deduplicated Pile: pythia-70m without the suffix has other weights.
MODELS: dict[str, ModelPreset] = {
    "pythia-70m": ModelPreset("EleutherAI/pythia-70m-deduped", (3, 1, 5), 4096, 64, (7, 30, 50, 100, 200)),
    "pythia-160m": ModelPreset("EleutherAI/pythia-160m-deduped", (4, 8), 6144, 64, (10, 75, 300)),
    "qwen2.5-3b": ModelPreset("Qwen/Qwen2.5-3B", (12, 24), 16384, 64, (7, 30, 102)),
    "llama-3.2-1b": ModelPreset("meta-llama/Llama-3.2-1B", (12, 6), 16384, 64, (7, 30, 102)),
    EMBEDDED: ModelPreset(EMBEDDED, (15,), 4608, 32, (7, 30), text=EMBEDDED),
}


def preset_for(name: str) -> ModelPreset | None:
    """The preset with this short name or hub id (letter case ignored), else None."""
    wanted = name.lower()
    for short, preset in MODELS.items():
        if wanted in (short, preset.hub_id.lower()):
            return preset
    return None
