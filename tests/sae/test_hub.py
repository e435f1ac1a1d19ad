"""The Hub, without one: what is asked of it, what it says when it is out of reach, the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from expander_sae.mask import Mask
from expander_sae.sae import SAE, hub
from expander_sae.sae.folder import SAEFolderError
from expander_sae.sae.hub import HubError


def toy() -> SAE:
    sae = SAE.expander(Mask.build("balanced", d_in=8, d_sae=13, degree=3, seed=2), 4)
    sae.metadata["trained_on"] = {"model": "owner/model", "layer": 3, "text": "prose"}
    sae.metadata["metrics"] = {"fvu": 0.25}
    return sae


class ClientError(Exception):
    """As the Hub's HTTP client raises them: no relative of OSError."""


class FakeApi:
    """What :class:`huggingface_hub.HfApi` is used for."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.fail: Exception | None = None
        self.sent: dict[str, bytes] = {}
        self.created: dict[str, Any] = {}

    def __call__(self, token: str | None = None) -> FakeApi:
        self.token = token
        return self

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.fail:
            raise self.fail
        self.created = {"repo_id": repo_id, **options}
        return f"hub:{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        assert commit_message
        assert repo_id == self.created["repo_id"]
        self.sent = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setattr(hub, "HfApi", fake)
    return fake


def unreachable(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_arguments: Any, **_options: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", download)


def test_a_folder_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable(AssertionError("the hub was asked"), monkeypatch)
    toy().save_pretrained(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        assert SAE.from_pretrained(folder).config() == toy().config()


def test_a_hub_id_is_fetched_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy().save_pretrained(tmp_path)
    asked: list[Any] = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend([repo_id, revision, allow_patterns])
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert SAE.from_pretrained("owner/sae", revision="v2").config() == toy().config()
    assert asked == ["owner/sae", "v2", ["config.json", "sae.safetensors"]]


def test_a_repository_that_holds_no_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda *_arguments, **_options: str(tmp_path))
    with pytest.raises(SAEFolderError, match=r"holds no config\.json"):
        SAE.from_pretrained("owner/other")


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("offline"), OfflineModeIsEnabled("offline"), ConnectionError("refused")]
)
def test_an_unreachable_hub_says_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable(error, monkeypatch)
    with pytest.raises(
        HubError, match="there is no folder runs/missing, and the Hugging Face Hub could not be reached"
    ) as caught:
        SAE.from_pretrained("runs/missing")
    assert "Check the path, or the network and HF_HUB_OFFLINE" in str(caught.value)


def test_the_real_library_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match="could not be reached"):
        SAE.from_pretrained("owner/nothing-of-this-name")


@pytest.mark.parametrize("name", ["a/b/c/d", "has spaces", "runs/../sae"])
def test_neither_a_folder_nor_an_id(name: str) -> None:
    with pytest.raises(HubError, match=r"there is no folder .*, and that is not a Hub id of the form owner/name"):
        SAE.from_pretrained(name)


@pytest.mark.parametrize("error", [ClientError("timed out"), OSError("disk full"), ValueError("revision")])
def test_whatever_else_goes_wrong_is_a_hub_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable(error, monkeypatch)
    with pytest.raises(HubError, match=f"did not deliver owner/sae: {error}"):
        SAE.from_pretrained("owner/sae")


def test_publishing(api: FakeApi, tmp_path: Path) -> None:
    sae = toy()
    assert sae.push_to_hub("owner/sae", private=True, token="secret") == "hub:owner/sae"
    assert api.token == "secret"
    assert api.created == {"repo_id": "owner/sae", "private": True, "exist_ok": True}
    assert set(api.sent) == {"README.md", "config.json", "sae.safetensors"}
    for name, data in api.sent.items():
        (tmp_path / name).write_bytes(data)
    h = torch.randn(3, 8)
    assert torch.equal(SAE.from_pretrained(tmp_path)(h), sae(h))


@pytest.mark.parametrize(
    "error", [ClientError("connection refused"), OSError("401 Unauthorized"), HFValidationError("bad id")]
)
def test_a_hub_that_refuses(error: Exception, api: FakeApi) -> None:
    api.fail = error
    with pytest.raises(HubError, match=f"could not publish owner/sae: {error}.*hf auth login"):
        toy().push_to_hub("owner/sae")


def test_a_damaged_folder_is_not_published(api: FakeApi, tmp_path: Path) -> None:
    toy().save_pretrained(tmp_path)
    (tmp_path / "sae.safetensors").write_bytes(b"")
    with pytest.raises(SAEFolderError):
        hub.publish(tmp_path, "owner/sae")
    assert not api.created


def test_model_card() -> None:
    card = hub.model_card(toy().config(), "owner/my-sae")
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "expander-sae",
        "tags": ["sparse-autoencoder", "mechanistic-interpretability"],
        "base_model": "owner/model",
    }
    assert body.startswith("\n# my-sae\n")
    lines = """
        | Activation width `d_in` | 8 |
        | Features `d_sae` | 13 |
        | Active features `k` | 4 |
        | Dictionary | expander, degree 3 |
        | Learned values | 39 |
        | layer | 3 |
        | text | prose |
        | fvu | 0.25 |
        sae = SAE.from_pretrained("owner/my-sae")
    """
    for line in lines.strip().splitlines():
        assert line.strip() in body.splitlines()


@pytest.mark.parametrize("model", [None, "embedded", "/models/mine", "./models/mine", "~/models/mine", "a/b/c"])
def test_only_a_hub_id_is_a_base_model(model: str | None) -> None:
    sae = SAE.dense(8, 13, k=4)
    sae.metadata["trained_on"] = {"model": model}
    card = hub.model_card(sae.config(), "owner/sae")
    assert "base_model" not in card
    assert "| Dictionary | dense |" in card


def test_a_bare_sae_has_a_card_too() -> None:
    card = hub.model_card(SAE.dense(8, 13, k=4).config(), "owner/sae")
    assert "Trained on" not in card
    assert "Metrics" not in card
