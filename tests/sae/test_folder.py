"""SAE folders: what is saved comes back bit for bit, and what was damaged does not come back at all."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from expander_sae.mask import Mask
from expander_sae.sae import SAE
from expander_sae.sae import folder as sae_folder
from expander_sae.sae.folder import CONFIG_NAME, TENSORS_NAME, SAEFolderError

M, N, D, K = 8, 13, 3, 4
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def toy(**options: Any) -> SAE:
    return SAE.expander(Mask.build("balanced", d_in=M, d_sae=N, degree=D, seed=2), K, **options)


def shake(sae: SAE) -> SAE:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shake(toy()).save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the config and its hash with it, as a foreign writer would."""
    config = json.loads((folder / CONFIG_NAME).read_text())
    change(config)
    config["config_sha256"] = sae_folder._config_hash(config)
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors and their hash with them."""
    tensors = load_file(folder / TENSORS_NAME)
    change(tensors)
    save_file(tensors, folder / TENSORS_NAME)
    data = (folder / TENSORS_NAME).read_bytes()
    recorded = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    rewrite(folder, lambda config: config.update(files={TENSORS_NAME: recorded}))


finite = st.floats(allow_nan=False, allow_infinity=False)
facts = st.none() | st.booleans() | st.integers() | finite | st.text(max_size=5)
texts = st.dictionaries(st.text(max_size=5), facts, max_size=3)


@settings(max_examples=60)
@given(data=st.data())
def test_round_trip(data: st.DataObject) -> None:
    m, n = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 20))
    k, kind = data.draw(st.integers(1, n)), data.draw(st.sampled_from(["dense", "drawn", "learned"]))
    options: dict[str, Any] = {name: data.draw(st.booleans()) for name in ("untied", "relu", "unit_norm")}
    if kind == "dense":
        sae = SAE.dense(m, n, k=k, **options)
    else:
        drawn = Mask.build(
            data.draw(st.sampled_from(["left-regular", "balanced"])),
            d_in=m,
            d_sae=n,
            degree=data.draw(st.integers(1, min(m, 12))),
            seed=data.draw(st.integers(0, 2**64 - 1)),
        )
        sae = SAE.expander(drawn if kind == "drawn" else Mask.from_rows(drawn.rows, m), k, **options)
    dtype = data.draw(st.sampled_from(DTYPES))
    sae = shake(sae).to(dtype)
    sae.metadata |= {"trained_on": data.draw(texts), "metrics": data.draw(texts)}
    with tempfile.TemporaryDirectory() as folder:
        sae.save_pretrained(folder)
        again = SAE.from_pretrained(folder)
        assert sorted(path.name for path in Path(folder).iterdir()) == [CONFIG_NAME, TENSORS_NAME]
        data_bytes = sum(t.numel() * t.element_size() for t in load_file(Path(folder) / TENSORS_NAME).values())
    assert again.config() == sae.config()
    assert again.dtype == dtype
    assert again.num_bytes == sae.num_bytes == data_bytes
    before, after = dict(sae.named_parameters()), dict(again.named_parameters())
    assert before.keys() == after.keys()
    for name, parameter in after.items():
        assert parameter.dtype == dtype
        assert parameter.requires_grad
        assert parameter.data_ptr() % 64 == 0  # where torch puts its own tensors: see sae_folder.read
        assert torch.equal(parameter, before[name])
    h = torch.randn(3, m, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(again(h), sae(h))


@pytest.mark.parametrize("d_in", [256, 257, 65_536, 65_537])
def test_learned_supports_of_every_width(d_in: int, tmp_path: Path) -> None:
    mask = Mask.from_rows(torch.tensor([[0, d_in - 1], [d_in // 2, d_in - 2]]), d_in)
    SAE.expander(mask, 1).save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path)
    assert again.dictionary.rows.tolist() == mask.rows.tolist()  # type: ignore[union-attr]
    assert again.dictionary.mask.recipe is None  # type: ignore[union-attr]


def test_a_pursuit_sae_round_trips(tmp_path: Path) -> None:
    sae = shake(toy()).with_encoder("omp", k=3, block=2)
    sae.save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path)
    assert again.config() == sae.config()
    h = torch.randn(5, M)
    assert torch.equal(again(h), sae(h))


def test_a_drawn_mask_costs_nothing_on_disk(folder: Path) -> None:
    assert set(load_file(folder / TENSORS_NAME)) == {"values", "b_enc", "b_dec"}


def test_the_config_names_what_it_holds(folder: Path) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    assert (config["format"], config["version"]) == ("expander-sae", 1)
    assert (config["d_in"], config["d_sae"], config["k"]) == (M, N, K)
    assert config["dictionary"]["mask"]["recipe"] == {"kind": "balanced", "d_in": M, "d_sae": N, "degree": D, "seed": 2}
    assert config["dictionary"]["mask"]["sha256"] == toy().dictionary.mask.sha256  # type: ignore[union-attr]
    assert config["files"][TENSORS_NAME]["bytes"] == (folder / TENSORS_NAME).stat().st_size


# Damage


@pytest.mark.parametrize("untied", [False, True])
def test_a_flipped_bit_anywhere_in_the_weights_is_found(untied: bool, tmp_path: Path) -> None:
    toy(untied=untied).half().save_pretrained(tmp_path)
    path = tmp_path / TENSORS_NAME
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(SAEFolderError, match=rf"{TENSORS_NAME} was altered: its SHA-256 is .*config.json records"):
            sae_folder.read(tmp_path)
    path.write_bytes(whole)
    SAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("flip", [0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0xFF])
def test_a_flipped_byte_anywhere_in_the_config_is_found(flip: int, folder: Path) -> None:
    path = folder / CONFIG_NAME
    whole = path.read_bytes()
    content = json.loads(whole)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= flip
        path.write_bytes(damaged)
        try:
            found = sae_folder.read_config(folder)
        except SAEFolderError:
            continue
        assert found == content  # such as 1e-05 for 1E-05: another way to write the same


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(SAEFolderError, match=name):
        SAE.from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1])
def test_truncated_weights(size: int, folder: Path) -> None:
    path = folder / TENSORS_NAME
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(SAEFolderError, match=rf"{TENSORS_NAME} has \d+ bytes, config.json records \d+"):
        SAE.from_pretrained(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": "other"}'])
def test_a_config_that_is_none(text: bytes, folder: Path) -> None:
    (folder / CONFIG_NAME).write_bytes(text)
    with pytest.raises(SAEFolderError, match=CONFIG_NAME):
        SAE.from_pretrained(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_names_both(version: Any, folder: Path) -> None:
    rewrite(folder, lambda config: config.update(version=version))
    with pytest.raises(SAEFolderError, match=f"format version {version}, this program reads version 1; upgrade"):
        SAE.from_pretrained(folder)


def test_a_mask_that_does_not_match_names_both_hashes(folder: Path) -> None:
    recorded = toy().dictionary.mask  # type: ignore[union-attr]
    rewrite(folder, lambda config: config["dictionary"]["mask"]["recipe"].update(seed=3))
    drawn = Mask.build("balanced", d_in=M, d_sae=N, degree=D, seed=3)
    with pytest.raises(SAEFolderError, match="the mask does not match") as caught:
        SAE.from_pretrained(folder)
    assert recorded.sha256 in str(caught.value)
    assert drawn.sha256 in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(k=3) or c["encoder"].update(k=N + 1), "k must be between 1 and d_sae"),
        (lambda c: c["dictionary"].update(kind="low-rank"), "unknown dictionary kind 'low-rank'"),
        (lambda c: c["dictionary"]["mask"]["recipe"].update(kind="ring"), "unknown mask kind 'ring'"),
        (lambda c: c["dictionary"]["mask"]["recipe"].update(colour=1), "colour"),
        (lambda c: c["encoder"].update(kind="gated"), "unknown encoder 'gated'"),
        (lambda c: c.pop("encoder"), "lacks 'encoder'"),
        (lambda c: c["dictionary"].pop("unit_norm"), "lacks 'unit_norm'"),
        (lambda c: c.update(d_sae=N + 1), f"b_enc should have shape .{N + 1},., it has .{N},"),
        (lambda c: c.update(d_in=M + 1), "b_dec should be floating point of shape"),
    ],
)
def test_a_consistent_folder_that_makes_no_sense(
    change: Callable[[dict[str, Any]], Any], message: str, folder: Path
) -> None:
    rewrite(folder, change)
    with pytest.raises(SAEFolderError, match=message):
        SAE.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("b_dec"), "lacks 'b_dec'"),
        (lambda t: t.pop("b_enc"), "lacks 'b_enc'"),
        (lambda t: t.pop("values"), "lacks 'values'"),
        (lambda t: t.update(b_dec=torch.zeros(M + 1)), "b_dec should be floating point of shape"),
        (lambda t: t.update(b_dec=torch.zeros(M, dtype=torch.int32)), "b_dec should be floating point"),
        (lambda t: t.update(values=torch.zeros(N, D + 1)), "values must have the mask's shape"),
        (lambda t: t.update(values=torch.zeros(N, D, dtype=torch.int32)), "floating point"),
    ],
)
def test_consistent_weights_that_make_no_sense(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, folder: Path
) -> None:
    rewrite_tensors(folder, change)
    with pytest.raises(SAEFolderError, match=message):
        SAE.from_pretrained(folder)


def test_an_encoder_of_another_size(tmp_path: Path) -> None:
    SAE.dense(M, N, k=K, untied=True).save_pretrained(tmp_path)
    rewrite_tensors(tmp_path, lambda t: t.update({"encoder.weight": torch.zeros(N + 1, M)}))
    with pytest.raises(SAEFolderError, match=f"the weights are {M} x {N + 1}, the config says {M} x {N}"):
        SAE.from_pretrained(tmp_path)


def test_not_a_safetensors_file(folder: Path) -> None:
    data = b"not tensors at all"
    (folder / TENSORS_NAME).write_bytes(data)
    recorded = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    rewrite(folder, lambda config: config.update(files={TENSORS_NAME: recorded}))
    with pytest.raises(SAEFolderError, match=f"{TENSORS_NAME} cannot be read"):
        SAE.from_pretrained(folder)


# Writing


def fails(*_arguments: Any, **_options: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device")


@pytest.mark.parametrize("trouble", ["disk", "metadata", "nan"])
def test_a_failed_save_leaves_the_old_sae_whole(trouble: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = toy(seed=9)
    if trouble == "disk":
        monkeypatch.setattr(sae_folder, "save_file", fails)
    other.metadata["metrics"] = {"disk": None, "metadata": {"fvu": torch.zeros(1)}, "nan": {"fvu": float("nan")}}[
        trouble
    ]
    with pytest.raises({"disk": OSError, "metadata": TypeError, "nan": ValueError}[trouble]):
        other.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    SAE.from_pretrained(folder)


def test_saving_over_an_sae_replaces_it(folder: Path) -> None:
    other = shake(SAE.dense(M, N, k=2))
    other.save_pretrained(folder)
    assert SAE.from_pretrained(folder).config() == other.config()


def test_saving_does_not_change_the_sae(tmp_path: Path) -> None:
    sae = shake(toy())
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    sae.save_pretrained(tmp_path / "new" / "folder")
    assert all(torch.equal(t, before[name]) for name, t in sae.state_dict().items())


def test_the_same_sae_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        shake(toy()).save_pretrained(tmp_path / name)
    for name in (CONFIG_NAME, TENSORS_NAME):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
