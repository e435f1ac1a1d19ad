"""Recipes: presets, files and flags into one checked configuration, and back."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from expander_sae.pursuit import SOLVERS
from expander_sae.training import TrainConfig
from expander_sae.training.recipe import (
    FIELDS,
    PRESET_NOTES,
    PRESETS,
    SAE_FIELDS,
    SAEConfig,
    parse_settings,
    read_config,
    resolve,
    settings_markdown,
    settings_reference,
)  # fmt: skip


def test_the_paper_is_the_defaults() -> None:
    recipe = resolve({"preset": "paper"})
    assert (recipe.sae, recipe.train) == (SAEConfig(), TrainConfig())
    assert (recipe.sae.dictionary, recipe.sae.encoder, recipe.sae.build(8).signed) == ("expander", "tied", True)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves_and_builds(preset: str) -> None:
    recipe = resolve({"preset": preset, "d_sae": 20, "k": 3, "degree": 4})
    assert recipe.preset == preset
    for name, value in PRESETS[preset].items():
        assert recipe.to_dict()[name] == value
    sae = recipe.sae.build(8)
    assert (sae.d_in, sae.d_sae, sae.k) == (8, 20, 3)


def test_later_settings_win_over_earlier_ones_and_both_over_the_preset() -> None:
    recipe = resolve({"lr": 0.5, "k": 3, "preset": "paper"}, {"k": 4}, {"steps": 7, "k": 5})
    assert (recipe.train.lr, recipe.sae.k, recipe.train.steps) == (0.5, 5, 7)
    assert recipe.train.lr_final == TrainConfig().lr_final
    assert resolve({"preset": "paper"}, {"preset": "modern", "lr": 0.1}).preset == "modern"
    assert resolve().preset == "modern"


def test_one_seed_for_both() -> None:
    recipe = resolve({"seed": 5})
    assert recipe.sae.seed == recipe.train.seed == 5


def test_no_name_but_the_seed_means_two_things() -> None:
    names = [{field.name for field in fields(section)} for section in (SAEConfig, TrainConfig)]
    assert names[0] & names[1] == {"seed"}
    assert set(FIELDS) == names[0] | names[1]
    assert all(set(preset) <= set(FIELDS) for preset in PRESETS.values())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_the_effective_settings_written_and_read_are_the_same(preset: str, suffix: str, tmp_path: Path) -> None:
    recipe = resolve({"preset": preset, "lr": "1e-3", "encoder": "omp", "encoder_options": {"block": 4}, "aux_k": 0})
    path = tmp_path / f"recipe{suffix}"
    whole = recipe.to_dict()
    path.write_text(json.dumps(whole) if suffix == ".json" else yaml.safe_dump(whole, sort_keys=False))
    assert resolve(read_config(path)) == recipe


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["lr=1e-3"], {"lr": 1e-3}),
        (["lr=1"], {"lr": 1.0}),
        (["lr_final=0"], {"lr_final": 0.0}),
        (["steps=200", "sparsity=batch-topk"], {"steps": 200, "sparsity": "batch-topk"}),
        ([" steps = 200 "], {"steps": 200}),
        (["sparsity_options={relu: no}"], {"sparsity_options": {"relu": False}}),
        (["b_dec_init=mean"], {"b_dec_init": "mean"}),
        (["steps=3", "steps=4"], {"steps": 4}),
        (
            ["encoder=omp", "encoder_options={block: 8, disjoint: true}"],
            {"encoder_options": {"block": 8, "disjoint": True}},
        ),
        (["preset=paper"], {"preset": "paper"}),
    ],
)
def test_settings_of_the_command_line(assignments: list[str], expected: dict[str, Any]) -> None:
    whole = resolve(parse_settings(assignments)).to_dict()
    for name, value in expected.items():
        assert whole[name] == value
        assert type(whole[name]) is type(value)


@pytest.mark.parametrize("assignment", ["lr", "=3", "", " =3"])
def test_not_an_assignment(assignment: str) -> None:
    with pytest.raises(ValueError, match="expected name=value, got"):
        parse_settings([assignment])


@pytest.mark.parametrize("assignment", ["lr=[1", "lr={a", "lr='x", "lr=@", "lr=a: b: c"])
def test_a_value_that_is_no_yaml(assignment: str) -> None:
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        parse_settings([assignment])


def test_a_value_may_hold_an_equals_sign() -> None:
    assert parse_settings(["name=a=b"]) == {"name": "a=b"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "best"}, "unknown preset 'best'; choose one of 'paper', 'modern'"),
        ({"preset": ["paper"]}, "unknown preset"),
        ({"preset": None}, "unknown preset None"),
        ({"learning_rate": 1}, "unknown setting 'learning_rate'; the settings are .*lr, lr_final"),
        ({"zebra": 1, 3: 4}, "unknown setting 'zebra', 3"),
        ({"steps": 2.5}, "steps must be of type int, got 2.5"),
        ({"steps": "2e3"}, "steps must be of type int, got '2e3'"),
        ({"steps": True}, "steps must be of type int, got True"),
        ({"steps": None}, "steps must be of type int, got None"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": "fast"}, "lr must be of type float, got 'fast'"),
        ({"lr": None}, "lr must be of type float, got None"),
        ({"lr": True}, "lr must be of type float"),
        ({"lr": "nan"}, "lr"),
        ({"lr_final": ".inf"}, "lr_final must be of type float, got '.inf'"),
        ({"lr_final": float("inf")}, "lr_final must be finite"),
        ({"sparsity_options": True}, "sparsity_options must be a mapping"),
        ({"sparsity_options": {"rellu": True}}, "the sparsity rule 'topk' has no option 'rellu'; did you mean 'relu'"),
        ({"sparsity": "topp"}, "unknown sparsity rule 'topp'; did you mean 'topk'"),
        ({"mask_options": {"alpha": 1}}, "mask kind 'left-regular' has no option 'alpha'; it takes none"),
        ({"dictionary": "sparse"}, "dictionary must be one of 'expander', 'dense', got 'sparse'"),
        ({"dictionary": ["dense"]}, "dictionary must be one of"),
        ({"mask": "ring"}, "unknown mask kind 'ring'"),
        ({"mask": 7}, "mask must be of type str"),
        ({"encoder": "gated"}, "unknown encoder 'gated'"),
        ({"encoder": 3}, "encoder must be of type str, got 3"),
        ({"encoder_options": {"block": 3}}, "the tied encoder has no option"),
        ({"encoder": "omp", "encoder_options": {"rounds": 3}}, "solver 'omp' has no option 'rounds'"),
        ({"encoder": "omp", "encoder_options": 3}, "encoder_options must be a mapping"),
    ],
)
def test_bad_settings(settings: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold `name: value` pairs, it holds a list"),
        ("", "it holds a NoneType"),
        ("lr: [1", "neither YAML nor JSON"),
    ],
)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_bad_files(text: str, message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"recipe{suffix}"
    path.write_text(text)
    if suffix == ".json" and text != "[1, 2]":
        message = "neither YAML nor JSON"
    with pytest.raises(ValueError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="neither YAML nor JSON"):
        read_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 30}, "k must be between 1 and d_sae = 20, got 30"),
        ({"k": 0}, "k must be between 1"),
        ({"degree": 9}, "degree 9 exceeds d_in 8"),
        ({"degree": 0}, "degree must be at least 1"),
        ({"d_sae": 0}, "d_sae"),
        ({"d_sae": 0, "dictionary": "dense"}, "d_sae must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve({"d_sae": 20, "k": 3, "degree": 4} | settings).sae.build(8)


@pytest.mark.parametrize("encoder", ["tied", "untied", *SOLVERS])
@pytest.mark.parametrize("dictionary", ["expander", "dense"])
def test_every_combination_is_built(dictionary: str, encoder: str) -> None:
    settings = {
        "d_sae": 20,
        "k": 3,
        "degree": 4,
        "dictionary": dictionary,
        "encoder": encoder,
        "mask": "balanced",
    }
    sae = resolve(settings).sae.build(8)
    assert sae.dictionary.kind == dictionary
    assert sae.encoder.kind == encoder
    if dictionary == "expander":
        assert sae.config()["dictionary"]["mask"]["kind"] == "balanced"
    if encoder in ("tied", "untied"):
        assert not sae.signed  # preset `modern`
    else:
        assert sae.signed  # whose ReLU yields to a pursuit, as its AuxK does


def test_the_seed_draws_mask_and_values() -> None:
    builds = [resolve({"d_sae": 20, "k": 3, "degree": 4, "seed": seed}).sae.build(8) for seed in (0, 0, 1)]
    assert builds[0].config() == builds[1].config() != builds[2].config()
    assert (builds[0].dictionary.to_dense() == builds[1].dictionary.to_dense()).all()


def test_every_setting_is_documented() -> None:
    for section in (SAEConfig, TrainConfig):
        body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body  # type: ignore[attr-defined]
        for here, after in itertools.pairwise(body):
            if isinstance(here, ast.AnnAssign):
                assert isinstance(after, ast.Expr), here.target.id  # type: ignore[union-attr]
                assert isinstance(after.value, ast.Constant)


# Presets that yield


def test_auxk_yields_to_resampling_where_no_features_are_ranked() -> None:
    recipe = resolve({"preset": "modern", "encoder": "omp"})
    assert (recipe.train.aux_k, recipe.train.resample_every, recipe.train.resample_norm) == (0, 250, "unit")
    assert recipe.sae.sparsity_options == {}
    assert resolve({"preset": "modern", "encoder": "omp", "resample_every": 9}).train.resample_every == 9
    assert resolve({"preset": "modern", "encoder": "omp", "aux_k": 5}).train.aux_k == 5  # which the trainer refuses
    assert resolve({"preset": "modern", "encoder": "untied"}).train.resample_every == 0


def test_a_pursuits_options_yield_to_an_encoder_without_one() -> None:
    assert resolve({"preset": "pursuit-nonneg"}).sae.encoder_options == {"nonnegative": True}
    assert resolve({"preset": "pursuit-nonneg", "encoder": "omp"}).sae.encoder_options == {"nonnegative": True}
    assert resolve({"preset": "pursuit-nonneg", "encoder": "tied"}).sae.encoder_options == {}
    with pytest.raises(ValueError, match="no option 'nonnegative'"):  # never signed codes without a word
        resolve({"preset": "pursuit-nonneg", "encoder": "cosamp"})


def test_nonnegative_codes_are_not_signed() -> None:
    sizes = {"d_sae": 20, "k": 3, "degree": 4}
    assert resolve({"preset": "pursuit"}, sizes).sae.build(8).signed
    assert not resolve({"preset": "pursuit-nonneg"}, sizes).sae.build(8).signed


def test_the_papers_letter_and_its_stable_form_differ_in_one_setting() -> None:
    letter, stable = (resolve({"preset": name}).to_dict() for name in ("paper", "paper-stable"))
    assert {name for name in letter if letter[name] != stable[name]} == {"preset", "b_dec_init"}
    assert letter["resample_norm"] == "inverse-sqrt-degree"
    for name in ("pursuit", "pursuit-nonneg"):  # measured with it
        assert PRESETS[name]["resample_norm"] == "unit"


def test_every_preset_has_its_line() -> None:
    assert PRESET_NOTES.keys() == PRESETS.keys()


# Starting from an SAE


def test_a_start_is_part_of_the_recipe() -> None:
    recipe = resolve({"from": "runs/a", "lr": 0.5})
    assert recipe.start == "runs/a"
    whole = recipe.to_dict()
    assert whole["from"] == "runs/a"
    assert not whole.keys() & SAE_FIELDS
    assert resolve(yaml.safe_load(recipe.to_yaml())) == recipe
    assert "from" not in resolve({}).to_dict()
    with pytest.raises(ValueError, match="from must be a folder, a Hub id or a checkpoint, got 3"):
        resolve({"from": 3})


# The reference


def test_the_reference_has_every_setting_once() -> None:
    reference = settings_reference()
    assert [setting.name for setting in reference] == list(dict.fromkeys(FIELDS))
    found = {setting.name: setting for setting in reference}
    assert found["lr"].default == "0.0003"
    assert (found["b_dec_init"].choices, found["b_dec_init"].default) == (("zero", "mean"), "zero")
    assert found["encoder"].choices[:2] == ("tied", "untied")
    assert (found["encoder_options"].type, found["scale_activations"].type) == ("mapping", "bool")
    for setting in reference:
        assert setting.text.endswith("."), setting
        assert "\n" not in setting.text
        assert yaml.safe_load(setting.default) is not None


def test_the_reference_as_markdown() -> None:
    text = settings_markdown()
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert [len(table) - 2 for table in tables] == [
        len(PRESETS),
        *(sum(setting.section == title for setting in settings_reference()) for title in ("SAE", "training")),
    ]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
