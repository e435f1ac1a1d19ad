"""SAE folders: what is saved comes back bit for bit, and what was damaged does not come back at all."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
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
    assert again.dictionary.recipe is None  # type: ignore[union-attr]


def test_a_pursuit_sae_round_trips(tmp_path: Path) -> None:
    sae = shake(toy()).with_encoder("omp", k=3, block=2)
    sae.save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path)
    assert again.config() == sae.config()
    h = torch.randn(5, M)
    assert torch.equal(again(h), sae(h))


def test_a_drawn_mask_costs_nothing_on_disk(folder: Path) -> None:
    assert set(load_file(folder / TENSORS_NAME)) == {"values", "encoder.b_enc", "b_dec"}


def test_the_config_names_what_it_holds(folder: Path) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    assert (config["format"], config["version"]) == ("expander-sae", 2)
    assert (config["d_in"], config["d_sae"], config["signed"]) == (M, N, True)
    assert config["sparsity"] == {"kind": "topk", "version": 1, "k": K, "relu": False, "rank": "signed"}
    assert config["encoder"] == {"kind": "tied", "version": 1}
    assert config["dictionary"] == {
        "kind": "expander",
        "version": 1,
        "unit_norm": True,
        "basis": {"kind": "standard", "version": 1},
        "storage": {"kind": "plain", "version": 1, "dtype": "float32"},
        "mask": {
            "kind": "balanced",
            "version": 1,
            "d_in": M,
            "d_sae": N,
            "degree": D,
            "seed": 2,
            "options": {},
            "sha256": toy().dictionary.mask.sha256,  # type: ignore[union-attr]
        },
    }
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


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_version_names_both(version: Any, folder: Path) -> None:
    rewrite(folder, lambda config: config.update(version=version))
    with pytest.raises(
        SAEFolderError, match=f"format version {version!r}, this program reads version 2; train and save"
    ):
        SAE.from_pretrained(folder)


def test_a_mask_that_does_not_match_names_both_hashes(folder: Path) -> None:
    recorded = toy().dictionary.mask  # type: ignore[union-attr]
    rewrite(folder, lambda config: config["dictionary"]["mask"].update(seed=3))
    drawn = Mask.build("balanced", d_in=M, d_sae=N, degree=D, seed=3)
    with pytest.raises(SAEFolderError, match="the mask does not match") as caught:
        SAE.from_pretrained(folder)
    assert recorded.sha256 in str(caught.value)
    assert drawn.sha256 in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["sparsity"].update(k=N + 1), "sparsity.k should be an integer from 1 to 13, it is 14"),
        (lambda c: c["dictionary"].update(kind="low-rank"), "unknown dictionary kind 'low-rank'"),
        (lambda c: c["dictionary"]["mask"].update(kind="ring"), "unknown mask kind 'ring'"),
        (lambda c: c["dictionary"]["mask"].update(options={"colour": 1}), "has no option 'colour'"),
        (lambda c: c["dictionary"]["mask"].update(version=2), "the recipe names version 2"),
        (lambda c: c["dictionary"]["mask"].update(degree=10**9), "mask.degree should be an integer from 1 to 8"),
        (lambda c: c["dictionary"].update(basis={"kind": "pca", "version": 1}), "basis: unknown basis 'pca'"),
        (
            lambda c: c["dictionary"].update(storage={"kind": "int4", "version": 1}),
            "dictionary.storage has kind 'int4'",
        ),
        (lambda c: c["dictionary"].update(unit_norm="yes"), "unit_norm should be true or false, it is 'yes'"),
        (lambda c: c["dictionary"].update(version=7), "dictionary has version 7, this program reads version 1"),
        (lambda c: c.update(metadata=[]), "config.metadata should be an object"),
        (lambda c: c.update(encoder=None), "config.encoder should be a section, it is None"),
        (lambda c: c.update(sections={}), "has an entry 'sections' that this program does not know"),
        (lambda c: c["sparsity"].update(kind="ranked"), "unknown sparsity rule 'ranked'"),
        (lambda c: c["sparsity"].update(relu=1), "sparsity.relu should be true or false, it is 1"),
        (lambda c: c["encoder"].update(kind="gated"), "unknown encoder 'gated'"),
        (lambda c: c.pop("encoder"), "lacks 'encoder'"),
        (lambda c: c["dictionary"].pop("unit_norm"), "lacks 'unit_norm'"),
        (lambda c: c.update(d_sae=N + 1), f"the mask is 8 x 13, the SAE 8 x {N + 1}"),
        (lambda c: c.update(d_in=M + 1), "'b_dec' should be floating point of shape"),
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
        (lambda t: t.pop("b_dec"), "the tensor 'b_dec' is missing"),
        (lambda t: t.pop("encoder.b_enc"), "the tensor 'b_enc' is missing"),
        (lambda t: t.pop("values"), "the tensor 'values' is missing"),
        (lambda t: t.update(values=torch.full((N, D), torch.nan)), "'values' holds NaN or infinity"),
        (lambda t: t.update(spare=torch.zeros(1)), "the tensor 'spare' belongs to no part of this SAE"),
        (lambda t: t.update(b_dec=torch.zeros(M + 1)), "'b_dec' should be floating point of shape"),
        (lambda t: t.update(b_dec=torch.zeros(M, dtype=torch.int32)), "'b_dec' should be floating point"),
        (lambda t: t.update(values=torch.zeros(N, D + 1)), "'values' should be floating point of shape"),
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
    rewrite_tensors(tmp_path, lambda t: t.update({"encoder.values": torch.zeros(N + 1, M)}))
    with pytest.raises(
        SAEFolderError, match=r"'values' should be floating point of shape \(13, 8\), it is torch.float32 \(14, 8\)"
    ):
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
        monkeypatch.setattr(sae_folder.safetensors.torch, "save_file", fails)
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


# A save is one atomic change


KILLED_SAVE = """
import os, signal, sys
from pathlib import Path
import torch
from expander_sae import SAE, Mask
calls, stop = 0, {stop}
def dying(original):
    def run(*arguments, **options):
        global calls
        calls += 1
        if calls == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    return run
os.replace, os.fsync = dying(os.replace), dying(os.fsync)
Path.replace = dying(Path.replace)
SAE.dense(8, 13, k=2, seed=5).save_pretrained({folder!r})
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_a_save_killed_anywhere_leaves_the_old_sae_or_the_new_one(tmp_path: Path) -> None:
    old, new = shake(toy()).config(), SAE.dense(8, 13, k=2, seed=5).config()
    seen = set()
    for stop in range(1, 12):
        place = tmp_path / str(stop)
        shake(toy()).save_pretrained(place)
        script = KILLED_SAVE.format(stop=stop, folder=str(place))
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        found = SAE.from_pretrained(place).config()
        assert found in (old, new)
        if ended.returncode == 0:
            assert found == new
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        seen.add(found == new)
        shake(toy()).save_pretrained(place)  # what is left lying about does not hinder the next save
        assert SAE.from_pretrained(place).config() == old
        assert sorted(path.name for path in place.glob("*")) == [CONFIG_NAME, TENSORS_NAME]
    else:
        pytest.fail("the save was never let through")
    assert seen == {True, False}  # it was killed before the switch and after it


def test_a_reader_meets_one_of_the_saves_and_never_a_mixture(tmp_path: Path) -> None:
    saes = [shake(toy()), shake(SAE.dense(M, N, k=2)), shake(toy(untied=True, seed=4))]
    expected = [{name: t.clone() for name, t in sae._stored_tensors().items()} for sae in saes]
    saes[0].save_pretrained(tmp_path)
    ended = threading.Event()

    def save() -> None:
        for number in range(150):
            saes[number % 3].save_pretrained(tmp_path)
        ended.set()

    writer = threading.Thread(target=save)
    writer.start()
    try:
        while not ended.is_set():
            found = SAE.from_pretrained(tmp_path)._stored_tensors()
            assert any(
                found.keys() == one.keys() and all(torch.equal(found[name], one[name]) for name in one)
                for one in expected
            )
    finally:
        writer.join()


def test_metadata_is_free_and_kept(tmp_path: Path) -> None:
    sae = toy()
    sae.metadata |= {"k": 5, "note": {"mine": [1, 2]}, "training": {"seconds": 1.5}}
    sae.certificate = {"kind": "coherence", "version": 1, "mu": 0.5}
    sae.save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path)
    assert again.k == K
    assert again.metadata == sae.metadata
    assert again.certificate == sae.certificate
    again.save_pretrained(tmp_path / "again")
    assert SAE.from_pretrained(tmp_path / "again").config() == sae.config()


def test_type_place_and_subfolder(tmp_path: Path) -> None:
    sae = shake(toy())
    sae.save_pretrained(tmp_path / "layer-3")
    again = SAE.from_pretrained(tmp_path, subfolder="layer-3", device="cpu", dtype=torch.float64)
    assert again.dtype == torch.float64
    assert not again.training
    assert torch.equal(again.dictionary.values, sae.dictionary.values.double())
