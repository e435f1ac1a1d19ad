"""Certificates: what they say, that they survive a round trip, and that they stay with their dictionary."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.theory import flat, gaussian, polynomial_mask, random_mask
from support.training import PAPER, activations, expander

from expander_sae import SAE, Mask, SparseCode
from expander_sae.data import TensorSource
from expander_sae.dictionary import DenseDictionary, ExpanderDictionary, ExpanderMatrix
from expander_sae.dictionary.basis import OrthogonalBasis
from expander_sae.evaluation import certify_sae
from expander_sae.sae import SAEFolderError
from expander_sae.sae.folder import CONFIG_NAME
from expander_sae.theory import Certificate, certify, is_of, levels, measure, one_line, recover, verdict
from expander_sae.training import train

GOOD = polynomial_mask(11, 7, 2, 121)


def again(certificate: Certificate) -> Certificate:
    return Certificate.from_dict(json.loads(json.dumps(certificate.to_dict(), allow_nan=False)))


def certified(folder: Path) -> SAE:
    """An SAE in a folder, with its certificate."""
    sae = expander()
    sae.certificate = certify_sae(sae, source=TensorSource(activations()), name="toy", rows=40).to_dict()
    sae.save_pretrained(folder)
    return sae


def test_a_flat_mask_of_overlap_one() -> None:
    known = certify(GOOD, k=16)
    assert known.sha256 == GOOD.sha256
    assert (known.omp_level, known.unique_level) == (3, 3)
    assert known.beta_squared == 1
    lower, upper = known.r_omp(1) or (math.nan, math.nan)
    assert lower == upper == pytest.approx(3 / 14)
    # 2·ε(6) is at most 2·5/14 by overlaps; at k = 4 the set of 8 columns decides.
    ends = known.r_id(3)
    assert ends is not None
    assert ends[1] < 1
    assert known.stability_1(3) == pytest.approx(math.sqrt(42 / 7) / (1 - float(ends[1])))
    assert known.stability_2(3) == pytest.approx(1 / math.sqrt(1 - 5 / 7))
    assert math.isinf(known.stability_2(4))
    assert math.isinf(known.stability_1(16))
    said = verdict(known)
    assert "every code of at most 3 active features" in said
    assert "used at k = 16, 5.33 times that" in said
    assert "no worst-case theorem speaks of it there" in said
    assert "R_OMP at k = 16" in said
    assert [row["k"] for row in levels(known)] == [1, 2, 3, 4, 16]
    assert again(known) == known


def test_within_the_guarantee() -> None:
    said = verdict(certify(GOOD, k=2))
    assert "used at k = 2: within the guarantee" in said
    assert "it holds" in said


def test_stability_in_the_1_norm() -> None:
    """T11 on random differences of two codes of three features."""
    known, unit = certify(GOOD, k=3), flat(GOOD).unit(torch.float64)[0].to_dense()
    generator = torch.Generator().manual_seed(0)
    place = torch.rand(2000, 121, generator=generator).argsort(dim=1)[:, :6]
    z = torch.zeros(2000, 121, dtype=torch.float64).scatter_(
        1, place, torch.randn(2000, 6, generator=generator).double()
    )
    assert bool((z.abs().sum(dim=1) <= known.stability_1(3) * (z @ unit.T).norm(dim=1)).all())


def test_trained_values_are_worse_than_their_mask_and_collapsed_columns_are_named() -> None:
    values = gaussian(GOOD).values
    values[5, 1:] = 0
    known = certify(ExpanderMatrix(GOOD.rows, values, GOOD.d_in), k=16)
    assert known.omp_level < 3
    assert known.beta_squared == pytest.approx(7)
    assert known.flatness is not None
    assert 1 < known.flatness[2] < math.sqrt(7)
    assert "collapsed to one entry (β = 2.65 = √d)" in verdict(known)
    assert "it fails" in verdict(known)
    assert again(known) == known


def test_dense_irregular_and_zero() -> None:
    dense = certify(DenseDictionary(torch.eye(5, 8)), k=2)
    assert dense.degree is None
    assert dense.r_id(1) is dense.r_omp(1) is dense.deficit(1) is None
    assert dense.omp_level == 5
    assert "No expansion part: the dictionary is dense" in verdict(dense)
    assert again(dense) == dense
    held = torch.ones(GOOD.rows.shape, dtype=torch.bool)
    held[::2, 0] = False
    irregular = Mask.from_rows(GOOD.rows, GOOD.d_in, held)
    for subject in (irregular, ExpanderDictionary(irregular)):
        known = certify(subject, k=4)
        assert known.degree is None
        assert "differ in degree" in verdict(known)
    known = certify(irregular, k=4)
    assert 1 / 7 <= float(known.coherence.mu) <= 1 / 6 + 1e-9
    values = torch.ones(121, 7)
    values[3] = 0
    nothing = certify(ExpanderMatrix(GOOD.rows, values, GOOD.d_in), k=4)
    assert nothing.omp_level == nothing.unique_level == 0
    assert "Nothing is guaranteed: 1 of 121 columns are zero" in verdict(nothing)
    assert again(nothing) == nothing


def test_a_basis_changes_no_inner_product() -> None:
    values = gaussian(GOOD).values
    turned = torch.linalg.qr(torch.randn(77, 77, generator=torch.Generator().manual_seed(1))).Q
    plain, rotated = ExpanderDictionary(GOOD, values), ExpanderDictionary(GOOD, values)
    rotated.basis = OrthogonalBasis(turned)
    one, other = certify(plain, k=4), certify(rotated, k=4)
    assert one.sha256 != other.sha256
    assert replace(other, sha256=one.sha256) == one
    indices = torch.rand(40, 121, generator=torch.Generator().manual_seed(2)).argsort(dim=1)[:, :5]
    code = SparseCode(indices.int(), torch.randn(40, 5, generator=torch.Generator().manual_seed(3)))
    found = [vars(measure(dictionary.matrix(), code, torch.ones(40))) for dictionary in (plain, rotated)]
    for name, figures in found[0].items():
        torch.testing.assert_close(figures, found[1][name])
    assert bool(recover(rotated.matrix(), code, torch.zeros(40)).exact.any())


def test_sizes() -> None:
    for k in (0, 122):
        with pytest.raises(ValueError, match=r"k must be in \[1, 121\]"):
            certify(GOOD, k=k)
    everything = certify(random_mask(9, 6, 3), k=6)
    assert everything.expansion(6) is not None
    assert everything.expansion(7) is None
    assert again(everything) == everything


def test_it_stays_with_the_sae(tmp_path: Path) -> None:
    sae = certified(tmp_path)
    loaded = SAE.from_pretrained(tmp_path)
    assert loaded.certificate == sae.certificate
    assert loaded.certificate is not None
    known = Certificate.from_dict(loaded.certificate)
    assert known.codes is not None
    assert (known.codes.tokens, known.codes.source, known.codes.encoder) == (40, "toy", "tied")
    assert "On 40 codes of toy (encoder tied)" in verdict(known)
    # Another encoder: the dictionary's part stays, the codes were others.
    other = loaded.with_encoder("omp").certificate
    assert other is not None
    assert other["codes"] is None
    assert Certificate.from_dict(other).omp_level == known.omp_level
    # Another type rounds the values: that is another dictionary.
    assert "certificate" not in loaded.to(torch.bfloat16).config()


def test_it_goes_when_the_dictionary_changes(tmp_path: Path) -> None:
    sae = certified(tmp_path)
    assert sae.certificate is not None
    with torch.no_grad():
        sae.dictionary.values[0, 0] += 1e-3
    assert not is_of(sae.certificate, sae.dictionary)
    sae.save_pretrained(tmp_path / "changed")
    assert SAE.from_pretrained(tmp_path / "changed").certificate is None
    supports = SAE.from_pretrained(tmp_path)
    assert isinstance(supports.dictionary, ExpanderDictionary)
    first = supports.dictionary.rows[:1]
    free = torch.tensor([[row for row in range(12) if row not in first[0]][:4]])
    supports.dictionary.move(torch.tensor([0]), free, supports.dictionary.values[:1].detach())
    assert "certificate" not in supports.config()


def test_it_goes_with_further_training(tmp_path: Path) -> None:
    certified(tmp_path / "before")
    sae = SAE.from_pretrained(tmp_path / "before")
    train(sae, TensorSource(activations()), PAPER, tmp_path / "after")
    assert sae.certificate is None
    assert SAE.from_pretrained(tmp_path / "after").certificate is None


def test_one_of_another_dictionary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = certified(tmp_path)
    assert sae.certificate is not None
    sae.certificate["sha256"] = "0" * 64
    monkeypatch.setattr("expander_sae.sae.certified.current", lambda certificate, _: {"certificate": certificate})
    sae.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert "0" * 64 in (tmp_path / CONFIG_NAME).read_text()
    with pytest.raises(SAEFolderError, match="certificate is of another dictionary"):
        SAE.from_pretrained(tmp_path)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kind": "other"}, "kind 'other'"),
    ({"version": 2}, "version 2"),
    ({"extra": 1}, "'extra'"),
    ({"k": "64"}, "certificate.k should be"),
    ({"mu_1": []}, "mu_1 should be a list"),
    ({"mu_1": [0.0, "1/0"]}, "should be a fraction"),
    ({"codes": {"tokens": 3}}, "lacks"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_forged_one_is_refused(change: dict[str, Any], message: str) -> None:
    entries = certify(GOOD, k=2).to_dict() | change
    with pytest.raises(ValueError, match=message):
        Certificate.from_dict(entries)
    whole = certify(GOOD, k=2).to_dict()
    whole["expansion"]["found"] = [0]
    with pytest.raises(ValueError, match="1 deficits from below and 4 from above"):
        Certificate.from_dict(whole)


def test_a_store_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="width 5"):
        certify_sae(expander(), source=TensorSource(torch.randn(9, 5)))


def test_in_one_line() -> None:
    assert one_line(certify(GOOD, k=9)) == "every code recovered up to k = 3, unique up to k = 3; used at k = 9"
