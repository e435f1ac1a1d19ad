"""``reproduce geometry``: the figures of one SAE by hand, both ends of what is bracketed, the paper's rows."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from expander_sae.data import ActivationStore
from expander_sae.experiments import geometry
from expander_sae.mask import Mask
from expander_sae.sae import SAE


def test_the_figures_of_one_sae_by_hand() -> None:
    mask, k = Mask.build("left-regular", d_in=12, d_sae=14, degree=3, seed=1), 2
    sae = SAE.expander(mask, k, seed=1)
    sae.metadata["training"] = {"fvu": 0.5}
    row = geometry.diagnose(sae, k, exact_up_to=4)
    w = sae.dictionary.to_dense().double()
    beta = math.sqrt(3) * w.abs().amax(dim=0)
    assert row["beta_max"] == pytest.approx(float(beta.max()), rel=1e-6)
    assert row["beta_median"] == pytest.approx(float(beta.median()), rel=1e-6)
    gram = (w.T @ w).abs().fill_diagonal_(0)
    assert row["mu"] == pytest.approx(float(gram.max()), rel=1e-6)
    assert row["mu1"] == pytest.approx(float(gram.topk(k, dim=1).values.sum(dim=1).max()), rel=1e-6)

    supports = [set(rows) for rows in mask.rows.tolist()]

    def eps(largest: int) -> float:
        sets = (one for s in range(1, largest + 1) for one in combinations(supports, s))
        return max(1 - len(set().union(*one)) / (3 * len(one)) for one in sets)

    square = float(beta.max()) ** 2
    for end in ("lower", "upper"):  # exact: sets of 3 and 4 columns are all looked at
        assert row[f"eps_omp_{end}"] == pytest.approx(eps(k + 1))
        assert row[f"eps_id_{end}"] == pytest.approx(eps(2 * k))
        assert row[f"r_omp_{end}"] == pytest.approx(square * eps(k + 1) * (2 * k + 1), rel=1e-5)
        assert row[f"r_id_{end}"] == pytest.approx(2 * square * eps(2 * k), rel=1e-5)
    use = torch.bincount(mask.rows.flatten().long(), minlength=12)
    assert (row["row_degree_least"], row["row_degree_most"]) == (int(use.min()), int(use.max()))


def test_the_table(tiny_store: ActivationStore, tmp_path: Path) -> None:
    settings = replace(geometry.SMOKE, masks=("left-regular", "clustered", "reed-solomon"), degrees=(3, 20))
    finding = geometry.run_geometry(settings, tmp_path)
    ours = [row for row in finding.rows if not row.get("published")]
    assert [(row["name"], row["degree"]) for row in ours] == [
        (name, degree) for name in ("left-regular", "clustered") for degree in (3, 20)
    ] + [("reed-solomon", 3)]
    assert any(note.startswith("Not to be had: reed-solomon at d = 20") for note in finding.notes)
    clustered = ours[2]
    assert clustered["eps_omp_lower"] == pytest.approx(0.75), "four columns of one block: 3 rows of 12"
    theirs = next(row for row in finding.rows if row.get("published"))
    shown = [column.show(theirs) for column in geometry.COLUMNS]
    assert shown == [
        "the paper's expander_tied, d=7",
        "1.56, 2.06, 2.64",
        "20.9",
        "≥ 0.663",
        "≥ 0.753",
        "≥ 598",
        "≥ 10.5",
    ]


def test_the_picture() -> None:
    rows = [
        {"name": name, "degree": degree, "mu1": 2.0, "beta_median": 1.5, "r_omp_lower": 9.0, "r_id_lower": None}
        for name in ("hub", "the paper's x")
        for degree in (7, 30)
    ]
    axes = geometry.plot_geometry(rows, "Title").axes
    assert [one.get_ylabel() for one in axes][:2] == ["μ₁(k)", "median β"]
    assert [len(one.get_lines()) for one in axes] == [2, 2, 3, 1]
