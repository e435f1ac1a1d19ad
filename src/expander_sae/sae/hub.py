"""The Hugging Face Hub: fetch an SAE folder, publish one with a model card."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from expander_sae.sae import folder as sae_folder

CARD_NAME = "README.md"
HUB_FILES = (sae_folder.CONFIG_NAME, sae_folder.TENSORS_NAME)


class HubError(OSError):
    """The Hub did not deliver or accept; says what to do."""


def local_folder(folder_or_id: str | Path, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The folder itself if it exists, else a cached download of the Hub repository of that id; ``subfolder`` inside it.

    Raises:
        HubError: no such folder and no such repository, or the Hub is out of reach.
    """
    folder, inside = Path(folder_or_id).expanduser(), subfolder or ""
    if folder.is_dir():
        return folder / inside
    wanted = [f"{inside.rstrip('/')}/{name}" if inside else name for name in HUB_FILES]
    try:
        return Path(snapshot_download(str(folder_or_id), revision=revision, allow_patterns=wanted)) / inside
    except HFValidationError:
        raise HubError(f"there is no folder {folder_or_id}, and that is not a Hub id of the form owner/name") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise HubError(
            f"there is no folder {folder_or_id}, and the Hugging Face Hub could not be reached to look for one "
            f"of that name ({type(error).__name__}). Check the path, or the network and HF_HUB_OFFLINE."
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"there is neither a folder nor a Hub repository {folder_or_id}; a private one needs `hf auth login`"
        ) from None
    except Exception as error:  # the HTTP client's own errors too, and which client that is depends on the version
        raise HubError(f"the Hugging Face Hub did not deliver {folder_or_id}: {error}") from error


def publish(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a saved SAE folder with a model card; returns the repository's address.

    Raises:
        HubError: the Hub refused or is out of reach.
        SAEFolderError: the folder is not whole (checked before anything is sent).
    """
    config, _ = sae_folder.read(folder)
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as staging:
            for name in HUB_FILES:
                (Path(staging) / name).write_bytes((Path(folder) / name).read_bytes())
            (Path(staging) / CARD_NAME).write_text(model_card(config, repo_id))
            api.upload_folder(repo_id=repo_id, folder_path=staging, commit_message="Upload Expander SAE")
    except Exception as error:  # as above
        raise HubError(
            f"could not publish {repo_id}: {error}. Log in with `hf auth login` (with write access), check the network."
        ) from error
    return str(address)


def model_card(config: dict[str, Any], repo_id: str) -> str:
    """A README for the Hub: what the SAE is, on what it was trained, how well it does, how to load it."""
    dictionary, encoder, sparsity = config["dictionary"], config["encoder"], config["sparsity"]
    metadata = config["metadata"]
    header = ["---", "library_name: expander-sae", "tags:", "- sparse-autoencoder", "- mechanistic-interpretability"]
    model = (metadata.get("trained_on") or {}).get("model")
    if model and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model):  # a Hub id, not a folder's path
        header.append(f"base_model: {model}")
    facts = {
        "Activation width `d_in`": config["d_in"],
        "Features `d_sae`": config["d_sae"],
        "Active features `k`": sparsity["k"],
        "Dictionary": dictionary["kind"] + (f", degree {dictionary['mask']['degree']}" if "mask" in dictionary else ""),
        "Encoder": encoder["kind"],
        "Sparsity": sparsity["kind"],
        "Codes": "signed" if config["signed"] else "not negative",
        "Learned values": f"{config['num_values']:,}",
        "Bytes of weights": f"{config['num_bytes']:,}",
    }
    lines = [*header, "---", "", f"# {repo_id.split('/')[-1]}", ""]
    lines += ["A sparse autoencoder made with `expander-sae` (Expander SAEs, arXiv 2607.01799).", ""]
    lines += ["| | |", "|---|---|"] + [f"| {name} | {value} |" for name, value in facts.items()]
    for title, section in (("Trained on", metadata.get("trained_on")), ("Metrics", metadata.get("metrics"))):
        if section:
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [
                f"| {name} | {value if isinstance(value, str) else json.dumps(value)} |"
                for name, value in section.items()
            ]
    lines += ["", "```python", "from expander_sae import SAE", "", f'sae = SAE.from_pretrained("{repo_id}")']
    lines += ["code = sae.encode(activations)  # code.indices, code.values: (..., k)", "```", ""]
    return "\n".join(lines)
