"""The manifest of a store: any damage ends in a StoreError that names it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stores import (
    SHARD,
    edit_manifest,
    harvest,
)

from expander_sae.data import (
    ActivationStore,
    Manifest,
    StoreError,
)


def test_no_manifest(tmp_path: Path, folder: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere", folder / SHARD):
        with pytest.raises(StoreError, match=r"not an activation store.*no manifest\.json"):
            ActivationStore.open(place)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version(folder: Path, version: Any) -> None:
    edit_manifest(folder, version=version)
    with pytest.raises(StoreError, match=f"format version {version!r}, this program reads 1"):
        ActivationStore.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_manifest_that_is_no_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(StoreError, match=r"manifest\.json"):
        ActivationStore.open(folder)


def test_a_manifest_with_pieces_missing_or_changed(folder: Path) -> None:
    whole = json.loads((folder / "manifest.json").read_text())
    del whole["sha256"]  # as first written: a manifest with its hash would be found by that
    broken = [
        {key: value for key, value in whole.items() if key != "cursor"},
        whole | {"meta": {"model": "toy"}},
        whole | {"meta": whole["meta"] | {"dtype": "int8"}},
        whole | {"shards": None},
        whole | {"shards": whole["shards"][:-1]},
        whole | {"shards": whole["shards"][::-1]},
        whole | {"num_rows": 71},
        whole | {"left_out_by_norm": -1},
        whole | {"complete": 1},
        whole | {"sha255": "0" * 64},  # one bit off
        whole | {"meta": whole["meta"] | {"d_in": "6"}},
        whole | {"meta": whole["meta"] | {"dtype": ["bfloat16"]}},
        whole | {"meta": whole["meta"] | {"skip_positions": [0.5]}},
        whole | {"meta": whole["meta"] | {"hoop": "residual"}},
        whole | {"meta": whole["meta"] | {"max_norm_multiple": float("nan")}},
        whole | {"meta": []},
        whole | {"shards": [*whole["shards"][:-1], whole["shards"][-1] | {"rows": True}]},
        whole | {"shards": [*whole["shards"][:-1], whole["shards"][-1] | {"sha256": "x"}]},
        whole | {"shards": [*whole["shards"][:-1], {"file": SHARD}]},
    ]
    for manifest in broken:
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(StoreError, match=r"manifest\.json is (damaged|not JSON)"):
            ActivationStore.open(folder)
    (folder / "manifest.json").write_text(json.dumps(whole))
    assert len(ActivationStore.open(folder)) == 70  # the old form


def error_or(read: Callable[[], Any]) -> Any:
    """What was read, or the message of the ``StoreError``; any other error is none of ours."""
    try:
        return read()
    except StoreError as error:
        return str(error)


def test_every_flipped_bit_of_a_manifest_is_found(folder: Path) -> None:
    path = folder / "manifest.json"
    whole, manifest = path.read_bytes(), Manifest.read(folder)
    for place in range(0, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        result = error_or(lambda: Manifest.read(folder))
        assert result == manifest or "manifest.json" in result  # the same: white space
    for text in ("[" * 100_000, '{"version": 1, "meta": ' * 2000, '{"version": NaN}', '{"version": true}'):
        path.write_text(text)
        with pytest.raises(StoreError, match=r"manifest\.json"):
            Manifest.read(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match=r"manifest\.json is a folder"):
        Manifest.read(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(place=st.integers(0), value=JSON, remove=st.booleans())
def test_forged_manifests_end_in_a_store_error(
    place: int, value: Any, remove: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any one value replaced or removed, the manifest's own hash made to agree."""
    folder = tmp_path_factory.getbasetemp() / "forged"
    if not folder.exists():
        harvest(folder)
        shutil.copy(folder / "manifest.json", folder / "whole")
    shutil.copy(folder / "whole", folder / "manifest.json")
    data = json.loads((folder / "whole").read_text())
    places: list[tuple[Any, Any]] = []

    def collect(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], (dict, list)):
                collect(inner[key])

    collect(data)
    container, key = places[place % len(places)]
    if remove:
        del container[key]
    else:
        container[key] = value
    path = folder / "manifest.json"
    data.pop("sha256", None)
    own_hash = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(data | {"sha256": own_hash}))
    result = error_or(lambda: ActivationStore.open(folder, allow_incomplete=True).rows(slice(None)).shape)
    assert result == (70, 6) or str(folder) in result


@pytest.mark.parametrize("change", [{"model": "another"}, {"d_in": 7}, {"dtype": "float16"}])
def test_another_models_manifest(folder: Path, change: dict[str, Any]) -> None:
    meta = json.loads((folder / "manifest.json").read_text())["meta"]
    edit_manifest(folder, meta=meta | change)
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors (holds|is a shard of another run)"):
        ActivationStore.open(folder)


def test_a_manifest_with_other_row_counts(folder: Path) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[1]["rows"] -= 1
    shards[2]["rows"] += 1
    edit_manifest(folder, shards=shards)
    with pytest.raises(StoreError, match=rf"{SHARD} holds .*\[21, 6\].* the manifest says .*\[20, 6\]"):
        ActivationStore.open(folder)
