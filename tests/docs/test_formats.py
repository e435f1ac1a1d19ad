"""docs/formats.md is enough to read and redraw: a second implementation, written from the page, agrees."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file
from support.house import ROOT

from expander_sae import SAE, Mask
from expander_sae.data import StoreMeta, StoreWriter, TensorSource
from expander_sae.sae import SPARSITIES
from expander_sae.theory import CodeSurvey, certify
from expander_sae.training import TrainConfig, train

PAGE = (ROOT / "docs" / "formats.md").read_text()
WORD = 2**64 - 1


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """A block of Philox4x64-10, from its authors' description."""
    c, k = [counter, 0, 0, 0], list(key)
    for number in range(10):
        if number:
            k = [(k[0] + 0x9E3779B97F4A7C15) & WORD, (k[1] + 0xBB67AE8584CAA73B) & WORD]
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(second >> 64) ^ c[1] ^ k[0], second & WORD, (first >> 64) ^ c[3] ^ k[1], first & WORD]
    return c


def word(seed: int, stream: int, i: int) -> int:
    return philox(i // 4 + 1, (seed, stream))[i % 4]


def left_regular(m: int, n: int, d: int, seed: int) -> list[list[int]]:
    rows = []
    for j in range(n):
        taken: set[int] = set()
        for t in range(d):
            last = m - d + t
            r = (word(seed, 0, j * d + t) * (last + 1)) >> 64
            taken.add(last if r in taken else r)
        rows.append(sorted(taken))
    return rows


def balanced(m: int, n: int, d: int, seed: int) -> list[list[int]]:
    cards: list[int] = []
    for deck in range(-(-n * d // m)):
        order = sorted(range(m), key=lambda row: (word(seed, 1 + deck, row), row))
        held = len(cards) % d
        if held:
            old = cards[-held:]
            free = [row for row in order if row not in old][: d - held]
            order = free + [row for row in order if row not in free]
        cards += order[: n * d - len(cards)]
    return [sorted(cards[j * d : j * d + d]) for j in range(n)]


@pytest.mark.parametrize(("m", "n", "d", "seed"), [(20, 33, 7, 1), (13, 50, 5, 2**63 + 5), (8, 9, 8, 0)])
def test_masks_can_be_drawn_from_the_page(m: int, n: int, d: int, seed: int) -> None:
    for kind, draw in (("left-regular", left_regular), ("balanced", balanced)):
        mask = Mask.build(kind, d_in=m, d_sae=n, degree=d, seed=seed)
        rows = draw(m, n, d, seed)
        assert mask.rows.tolist() == rows
        flat = [row for column in rows for row in column]
        data = b"expander-sae mask v1\0" + struct.pack("<3q", m, n, d) + struct.pack(f"<{n * d}i", *flat)
        assert mask.sha256 == hashlib.sha256(data).hexdigest()


def keys_of(heading: str) -> set[str]:
    """First column of the table that follows a line which begins with ``heading``."""
    after = PAGE[re.search(rf"^{re.escape(heading)}", PAGE, flags=re.MULTILINE).end() :]  # type: ignore[union-attr]
    lines = after[after.index("\n|") + 1 :].splitlines()
    table = lines[2 : next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return {key for line in table for key in re.findall(r"`([^`]+)`", line.split("|")[1])}


def saved(folder: Path, *, explicit: bool) -> tuple[dict, dict[str, np.ndarray]]:
    mask = Mask.build("left-regular", d_in=20, d_sae=33, degree=5)
    mask = Mask.from_rows(mask.rows, 20) if explicit else mask
    SAE.expander(mask, 4, untied=explicit).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "sae.safetensors")


@pytest.mark.parametrize("explicit", [False, True])
def test_an_sae_folder_has_the_fields_of_the_page(explicit: bool, tmp_path: Path) -> None:
    config, tensors = saved(tmp_path, explicit=explicit)
    assert config.keys() == keys_of("## An SAE folder") - {"certificate"}
    assert config["dictionary"].keys() == keys_of("**`dictionary`**")
    assert config["dictionary"]["mask"].keys() == keys_of("**`dictionary.mask`**") - (
        {"seed", "options"} if explicit else set()
    )
    assert config["encoder"] == {"kind": "untied" if explicit else "tied", "version": 1}
    assert config["sparsity"] == {"kind": "topk", "version": 1, "k": 4, "relu": False, "rank": "signed"}
    assert tensors.keys() <= keys_of("`sae.safetensors` holds")
    own = {key: value for key, value in config.items() if key != "config_sha256"}
    assert config["config_sha256"] == hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    data = (tmp_path / "sae.safetensors").read_bytes()
    assert config["files"] == {"sae.safetensors": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}


@pytest.mark.parametrize("explicit", [False, True])
def test_an_sae_can_be_run_from_the_page(explicit: bool, tmp_path: Path) -> None:
    config, tensors = saved(tmp_path, explicit=explicit)
    sizes = config["dictionary"]["mask"]
    rows = tensors["rows"].tolist() if explicit else left_regular(20, 33, 5, sizes["seed"])
    values = tensors["values"] / np.linalg.norm(tensors["values"], axis=1, keepdims=True)
    reading = tensors["encoder.values"] if explicit else values
    w, v = np.zeros((20, 33), dtype=np.float32), np.zeros((20, 33), dtype=np.float32)
    for j, support in enumerate(rows):
        w[support, j], v[support, j] = values[j], reading[j]
    h = np.random.default_rng(0).standard_normal((6, 20)).astype(np.float32)
    z = (h - tensors["b_dec"]) @ v + tensors["encoder.b_enc"]
    x = np.where(z >= np.sort(z, axis=1)[:, -4:-3], z, 0)
    expected = x @ w.T + tensors["b_dec"]
    found = SAE.from_pretrained(tmp_path)(torch.from_numpy(h))
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-5)


def test_a_certificate_has_the_fields_of_the_page() -> None:
    certificate = certify(Mask.build("left-regular", d_in=20, d_sae=33, degree=5), k=4).to_dict()
    assert certificate.keys() == keys_of("**`certificate`**")
    named = set(re.findall(r"`([\w.]+)`", PAGE))
    assert certificate["expansion"].keys() <= named
    assert CodeSurvey.__dataclass_fields__.keys() <= named


def table_after(heading: str) -> list[list[set[str]]]:
    """Names in backticks in each cell of the table that follows a line which begins with ``heading``."""
    after = PAGE[re.search(rf"^{re.escape(heading)}", PAGE, flags=re.MULTILINE).end() :]  # type: ignore[union-attr]
    lines = after[after.index("\n|") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[set(re.findall(r"`([^`]+)`", cell)) for cell in line.split("|")[1:-1]] for line in lines]


def of_rule(kind: str, folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """A folder of an SAE whose rule has the named kind and was trained for a moment, and what it holds."""
    mask = Mask.build("left-regular", d_in=20, d_sae=33, degree=5)
    sae = SAE.expander(mask, 4, sparsity=SPARSITIES[kind](33, 4))
    rows = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
    train(sae, TensorSource(rows), TrainConfig(steps=20, batch_size=32, resample_every=0, lr=0.05), folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "sae.safetensors")


@pytest.mark.parametrize("kind", SPARSITIES)
def test_a_rules_section_and_tensors_are_those_of_the_page(kind: str, tmp_path: Path) -> None:
    config, tensors = of_rule(kind, tmp_path)
    options = next(row[1] for row in table_after("**`sparsity`** has") if kind in row[0])
    assert config["sparsity"].keys() == {"kind", "version", "k"} | options
    named = set().union(*(row[0] for row in table_after("`sae.safetensors` holds") if kind in row[2]))
    assert {name for name in tensors if name.startswith("sparsity.")} == named


@pytest.mark.parametrize("kind", SPARSITIES)
def test_a_rule_can_be_run_from_the_page(kind: str, tmp_path: Path) -> None:
    config, tensors = of_rule(kind, tmp_path)
    assert config["sparsity"].get("capacity", 16) == 16
    w = np.zeros((20, 33), dtype=np.float32)
    for j, support in enumerate(left_regular(20, 33, 5, 0)):
        w[support, j] = tensors["values"][j] / np.linalg.norm(tensors["values"][j])
    h = np.random.default_rng(0).standard_normal((50, 20)).astype(np.float32)
    u = (h - tensors["b_dec"]) @ w
    z = u + tensors["encoder.b_enc"]
    at = {name.removeprefix("sparsity."): tensor for name, tensor in tensors.items()}
    if kind == "topk":
        threshold = np.sort(z, axis=1)[:, -5:-4]
    elif kind == "jumprelu":
        threshold = at["unit"] * np.exp(at["log_threshold"])
    else:
        threshold = at.get("threshold", 0.0)
    margin = np.where(z > threshold, z - threshold, -np.inf)
    best = margin >= np.sort(margin, axis=1)[:, -16:-15]  # the capacity
    x = z if kind != "gated" else np.maximum(np.exp(at["r_mag"]) * u + at["b_mag"], 0)
    x = np.where((z > threshold) & best, x, 0)
    found = SAE.from_pretrained(tmp_path)(torch.from_numpy(h))
    np.testing.assert_allclose(found.detach().numpy(), x @ w.T + tensors["b_dec"], atol=1e-5)


def test_a_store_has_the_fields_of_the_page(tmp_path: Path) -> None:
    meta = StoreMeta("model", None, "tokenizer", "residual", 3, 20, "float32", "text", 16)
    with StoreWriter(tmp_path, meta, expected_rows=50) as writer:
        writer.append(torch.randn(50, 20), torch.arange(50), torch.arange(50), cursor=None)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest.keys() == keys_of("`manifest.json`:")
    own = {key: value for key, value in manifest.items() if key != "sha256"}
    assert manifest["sha256"] == hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    assert manifest["meta"].keys() == keys_of("`meta` has the fields")
    data = (tmp_path / "shard-00000.safetensors").read_bytes()
    unnamed = "weights", "tokenizer_hash", "norm_median", "norm_limit", "bos", "concatenate", "skip_special"
    named = {key: value for key, value in manifest["meta"].items() if key not in unnamed}
    label = f"{hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()}:0"
    header = header_of(tmp_path / "shard-00000.safetensors")
    assert header.pop("__metadata__") == {"store": label}
    assert {name: entry["dtype"] for name, entry in header.items()} == {
        "acts": "F32",
        "tokens": "I32",
        "positions": "I32",
    }
    shard = {
        "file": "shard-00000.safetensors",
        "rows": 50,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert manifest["shards"] == [shard]


def header_of(path: Path) -> dict[str, dict[str, str]]:
    """The JSON header of a safetensors file."""
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_a_run_has_the_files_of_the_page(tmp_path: Path) -> None:
    mask = Mask.build("left-regular", d_in=20, d_sae=33, degree=5)
    config = TrainConfig(steps=4, batch_size=8, log_every=2, checkpoint_every=2)
    train(SAE.expander(mask, 4), TensorSource(torch.randn(64, 20)), config, tmp_path)
    metadata = header_of(tmp_path / "checkpoint.safetensors")["__metadata__"]
    assert metadata.keys() == keys_of("**`checkpoint.safetensors`**")
    recorded = metadata.pop("sha256")
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(safetensors.torch.load_file(tmp_path / "checkpoint.safetensors").items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    assert recorded == digest.hexdigest()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    named = set(re.findall(r"`([\w.]+)`", PAGE))
    # A run from Python writes no recipe.yaml: the command does.
    assert {path.name for path in tmp_path.iterdir()} - named == set()


def test_results_have_the_fields_of_the_page() -> None:
    results = ROOT / "docs" / "results" / "amortisation" / "results.json"
    assert json.loads(results.read_text()).keys() == keys_of("`results.json` of an experiment")
