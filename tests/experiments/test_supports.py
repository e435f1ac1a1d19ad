"""SAEs on any arm's supports: what differs between arms, and what a second run does not do again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expander_sae.data import ActivationStore
from expander_sae.dictionary import OrthogonalBasis
from expander_sae.experiments.common.supports import ARMS, LEARNED, Supports, arm_named, mask_of, refusal
from expander_sae.mask import CONSTRUCTIONS
from expander_sae.sae import SAE

TRAINING = {"paper-stable": {"steps": 6, "batch_size": 50}, "pursuit": {"steps": 4, "batch_size": 50}}


@pytest.fixture
def supports(tiny_store: ActivationStore, tmp_path: Path) -> Supports:
    return Supports(tiny_store, tmp_path, d_sae=48, k=3, training=TRAINING)


def test_every_arm_is_a_known_mask() -> None:
    assert {arm.mask for arm in ARMS.values()} <= {*CONSTRUCTIONS, LEARNED}
    with pytest.raises(ValueError, match="unknown arm 'lerned'; did you mean 'learned'"):
        arm_named("lerned")


def test_masks_that_do_not_exist() -> None:
    assert refusal("left-regular", 32, 48, 3) is None
    assert "reed-solomon" in str(refusal("reed-solomon", 32, 48, 20))
    with pytest.raises(ValueError, match="unknown mask kind"):
        refusal("lerned", 32, 48, 3)


@pytest.mark.parametrize("name", ["left-regular", "clustered", "weighted", "learned", "random-basis"])
def test_values_and_budget_are_the_same_in_every_arm(name: str, supports: Supports) -> None:
    sae = supports.sae(name, ARMS[name], "pursuit", degree=3, seed=1)
    basis = 0 if ARMS[name].basis == "standard" else supports.source.d_in**2
    assert (sae.num_values, sae.dictionary.num_values) == (3 * 48 + basis, 3 * 48)
    assert (sae.k, sae.encoder.kind) == (3, "matching-pursuit")
    summary = sae.metadata["training"]
    assert (summary["steps"], summary["config"]["batch_size"], summary["config"]["seed"]) == (4, 50, 1)
    assert ("continues" in summary) == (name == "learned"), "what came before is on record"


def test_learned_supports_are_those_of_the_dense_sae_that_was_trained(supports: Supports) -> None:
    sae = supports.sae("a", ARMS["learned"], "paper-stable", degree=3, seed=0, changes={"steps": 2})
    dense = SAE.from_pretrained(supports.out / supports.dense_name("paper-stable", 0))
    assert dense.metadata["training"]["steps"] == 6, "one dense SAE for all degrees, whatever changes"
    assert sae.metadata["training"]["steps"] == 2
    largest = dense.dictionary.to_dense().T.abs().topk(3, dim=1).indices.sort(dim=1).values
    assert torch.equal(mask_of(sae).rows.long(), largest)
    again = supports.sae("a", ARMS["learned"], "paper-stable", degree=3, seed=0, changes={"steps": 2})
    assert torch.equal(again.dictionary.to_dense(), sae.dictionary.to_dense()), "a finished run is taken as it is"


def built(supports: Supports, name: str, seed: int = 0) -> SAE:
    return supports.sae(f"{name}-{seed}", ARMS[name], "pursuit", degree=3, seed=seed, changes={"steps": 1})


def test_weights_are_the_variances_in_the_arms_own_basis(supports: Supports) -> None:
    def weights(name: str) -> list[float]:
        recipe = mask_of(built(supports, name)).recipe
        assert recipe is not None
        return recipe.options["weights"]

    assert mask_of(built(supports, "left-regular")).recipe.options == {}  # type: ignore[union-attr]
    ranked = weights("pca-basis-weighted")
    assert ranked == sorted(ranked, reverse=True), "principal axes come by falling variance"
    variances = supports.source.rows(slice(None)).double().var(dim=0, correction=0)
    assert weights("weighted") == pytest.approx(variances.tolist(), rel=1e-4)


def test_bases(supports: Supports) -> None:
    assert built(supports, "left-regular").dictionary.basis is None
    drawn = [built(supports, "random-basis", seed).dictionary.basis.sha256 for seed in (0, 1)]  # type: ignore[union-attr]
    assert drawn[0] == OrthogonalBasis.random(supports.source.d_in, 0).sha256
    assert drawn[0] != drawn[1]
    axes = [built(supports, "pca-basis", seed).dictionary.basis.sha256 for seed in (0, 1)]  # type: ignore[union-attr]
    assert axes[0] == axes[1]


def test_bernoulli_masks_have_as_many_values_on_average(supports: Supports) -> None:
    sae = supports.sae("a", ARMS["bernoulli"], "pursuit", degree=3, seed=1)
    counts = mask_of(sae).counts
    assert sae.num_values == int(counts.sum()) == pytest.approx(3 * 48, rel=0.3)
    assert counts.min() < counts.max()
    assert mask_of(SAE.from_pretrained(supports.out / "a")).sha256 == mask_of(sae).sha256
