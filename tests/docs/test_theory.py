"""The inequalities of docs/theory.md on random instances: a formula there that is wrong fails here."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

M, N, D = 24, 40, 4
Array = np.ndarray


def draw(seed: int, flat: bool = False) -> tuple[Array, Array]:
    """Supports ``(n, d)`` and unit-norm columns ``(m, n)``."""
    rng = np.random.default_rng(seed)
    rows = np.array([np.sort(rng.choice(M, D, replace=False)) for _ in range(N)])
    values = rng.choice([-1.0, 1.0], (N, D)) if flat else rng.standard_normal((N, D))
    columns = np.zeros((M, N))
    np.put_along_axis(columns, rows.T, (values / np.linalg.norm(values, axis=1, keepdims=True)).T, axis=0)
    return rows, columns


def binary(rows: Array) -> Array:
    mask = np.zeros((M, N), dtype=int)
    np.put_along_axis(mask, rows.T, 1, axis=0)
    return mask


def neighbours(rows: Array, columns: tuple[int, ...]) -> int:
    return len(np.unique(rows[list(columns)]))


def expansion(rows: Array, s: int) -> float:
    """``ε(s)``, by looking at every set."""
    sets = (c for size in range(1, s + 1) for c in itertools.combinations(range(N), size))
    return max(1 - neighbours(rows, columns) / (D * len(columns)) for columns in sets)


def overlaps(rows: Array) -> Array:
    shared = binary(rows).T @ binary(rows)
    np.fill_diagonal(shared, 0)
    return shared


def flatness(columns: Array) -> float:
    return float(np.sqrt(D) * np.abs(columns).max())


def cumulative_coherence(columns: Array, s: int) -> float:
    gram = np.abs(columns.T @ columns)
    np.fill_diagonal(gram, 0)
    return float(np.sort(gram, axis=1)[:, -s:].sum(axis=1).max()) if s else 0.0


SEEDS = range(6)


@pytest.mark.parametrize("seed", SEEDS)
def test_t1_t2_overlaps_bound_the_expansion_of_every_set(seed: int) -> None:
    rows, _ = draw(seed)
    a = overlaps(rows).max()
    assert expansion(rows, 2) == pytest.approx(a / (2 * D))  # D2
    rng = np.random.default_rng(seed)
    for s in range(2, 12):
        for _ in range(100):
            found = neighbours(rows, tuple(rng.choice(N, s, replace=False)))
            assert M >= found >= D * s - a * s * (s - 1) / 2
            assert found >= D * D * s / (D + a * (s - 1)) - 1e-9


def test_t4_polynomials_overlap_in_less_than_their_degree() -> None:
    q, d = 11, 5
    for t in (2, 3):
        points = np.arange(d)
        columns = [sum(c * points**i for i, c in enumerate(f)) % q for f in itertools.product(range(q), repeat=t)]
        rows = points * q + np.array(columns)
        mask = np.zeros((len(rows), d * q), dtype=int)
        np.put_along_axis(mask, rows, 1, axis=1)
        shared = mask @ mask.T
        np.fill_diagonal(shared, 0)
        assert shared.max() == t - 1
        assert set(mask.sum(axis=0)) == {q ** (t - 1)}


def test_t5_tanner() -> None:
    q, d = 11, 5
    points = np.arange(d)
    rows = points * q + np.array([(a * points + b) % q for a in range(q) for b in range(q)])
    mask = np.zeros((d * q, q * q))
    np.put_along_axis(mask, rows.T, 1, axis=0)
    second = np.linalg.svd(mask, compute_uv=False)[1] ** 2
    rng = np.random.default_rng(0)
    for s in (2, 5, 20, 60):
        for _ in range(50):
            found = len(np.unique(rows[rng.choice(q * q, s, replace=False)]))
            assert found >= d * d * s / (second + (d * q - second) * s / (q * q)) - 1e-9


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_t6_to_t8_collisions_and_the_one_norm(seed: int, flat: bool) -> None:
    rows, columns = draw(seed, flat)
    s, beta, rng = 3, flatness(columns), np.random.default_rng(seed)
    eps = expansion(rows, s)
    assert (np.abs(columns).sum(axis=0) >= np.sqrt(D) / beta - 1e-12).all()  # D4
    for _ in range(300):
        chosen = rng.choice(N, s, replace=False)
        z = rng.standard_normal(s)
        order = np.argsort(-np.abs(z))
        size, seen, weighted = np.abs(z[order]), set(), 0.0
        for amount, column in zip(size, chosen[order], strict=True):
            weighted += amount * len(seen & set(rows[column]))
            seen |= set(rows[column])
        assert weighted <= eps * D * size.sum() + 1e-12
        bound = np.sqrt(D) / beta * (1 - 2 * beta**2 * eps) * size.sum()
        assert np.abs(columns[:, chosen] @ z).sum() >= bound - 1e-12


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_t9_coherence(seed: int, flat: bool) -> None:
    rows, columns = draw(seed, flat)
    beta, shared = flatness(columns), overlaps(rows)
    for s in (1, 2):
        found = cumulative_coherence(columns, s)
        assert found <= beta**2 * expansion(rows, s + 1) * (s + 1) + 1e-12
        star = beta**2 / D * np.sort(shared, axis=1)[:, -s:].sum(axis=1).max()
        assert found <= star + 1e-12
        assert star <= beta**2 * shared.max() * s / D + 1e-12


def omp(columns: Array, h: Array, k: int) -> Array:
    """S2 by least squares anew in every round."""
    support: list[int] = []
    residual = h
    for _ in range(k):
        support.append(int(np.abs(columns.T @ residual).argmax()))
        residual = h - columns[:, support] @ np.linalg.lstsq(columns[:, support], h, rcond=None)[0]
    return np.array(support)


def test_t10_t12_omp_finds_certified_codes_with_and_without_noise() -> None:
    q, d = 11, 7  # overlap 1: flat columns certify k with 2k - 1 < d
    points = np.arange(d)
    rows = points * q + np.array([(a * points + b) % q for a in range(q) for b in range(q)])
    columns = np.zeros((d * q, q * q))
    np.put_along_axis(columns, rows.T, d**-0.5, axis=0)
    k = 3
    left = 1 - cumulative_coherence(columns, k) - cumulative_coherence(columns, k - 1)
    assert left == pytest.approx(1 - (2 * k - 1) / d)
    rng = np.random.default_rng(0)
    for _ in range(200):
        support = rng.choice(q * q, k, replace=False)
        x = rng.choice([-1, 1], k) * rng.uniform(1, 5, k)
        noise = rng.standard_normal(d * q)
        noise *= 0.99 * np.abs(x).min() * left / 2 / np.linalg.norm(noise)
        for e in (np.zeros_like(noise), noise):
            assert set(omp(columns, columns[:, support] @ x + e, k)) == set(support)


def test_s1_correlations_change_on_shared_rows_only() -> None:
    rows, columns = draw(0)
    r = np.random.default_rng(1).standard_normal(M)
    before = columns.T @ r
    j = int(np.abs(before).argmax())
    after = columns.T @ (r - before[j] * columns[:, j])
    np.testing.assert_allclose(after, before - before[j] * (columns.T @ columns[:, j]), atol=1e-12)
    apart = overlaps(rows)[j] == 0
    apart[j] = False
    np.testing.assert_allclose(after[apart], before[apart], atol=1e-12)


def test_s2_s4_the_inverse_factor_gives_least_squares_and_distances_to_the_span() -> None:
    _, columns = draw(2)
    h = np.random.default_rng(3).standard_normal(M)
    support = [3, 11, 20, 31]
    inverse, z, x = np.zeros((0, 0)), np.zeros(0), np.zeros(0)
    distance = np.ones(N)
    for count, j in enumerate(support):
        w = columns[:, j]
        y = inverse @ (columns[:, support[:count]].T @ w)
        p = 1 - y @ y
        assert p == pytest.approx(distance[j])
        row = np.append(-y @ inverse, 1) / np.sqrt(p)
        amount = (w @ h - y @ z) / np.sqrt(p)
        inverse = np.vstack([np.pad(inverse, ((0, 0), (0, 1))), row])
        z, x = np.append(z, amount), np.append(x, 0) + amount * row
        taken = columns[:, support[: count + 1]]
        np.testing.assert_allclose(x, np.linalg.lstsq(taken, h, rcond=None)[0], atol=1e-10)
        distance -= (columns.T @ (taken @ row)) ** 2
    projected = columns - taken @ np.linalg.lstsq(taken, columns, rcond=None)[0]
    np.testing.assert_allclose(distance, (projected**2).sum(axis=0), atol=1e-10)


def test_s6_the_step_rule_of_niht_forbids_a_larger_residual() -> None:
    """For any ``Δ = H_k(x + μg) - x`` with ``μ ≤ (1 - c) ‖Δ‖²/‖WΔ‖²``."""
    _, columns = draw(4)
    rng = np.random.default_rng(5)
    k, slack = 5, 0.01
    for _ in range(200):
        x = np.zeros(N)
        x[rng.choice(N, k, replace=False)] = rng.standard_normal(k)
        h = rng.standard_normal(M)
        gradient, step = columns.T @ (h - columns @ x), 4.0
        while True:
            proposed = x + step * gradient
            new = np.where(np.abs(proposed) >= np.sort(np.abs(proposed))[-k], proposed, 0)
            moved = new - x
            if not moved.any() or step <= (1 - slack) * (moved @ moved) / np.sum((columns @ moved) ** 2):
                break
            step /= 2 * (1 - slack)
        assert np.linalg.norm(h - columns @ new) <= np.linalg.norm(h - columns @ x) + 1e-12


def test_p2_p3_the_recipe_sums_to_its_reach_and_scaling_folds_back() -> None:
    steps = np.arange(5000)
    rates = 1e-5 + (3e-4 - 1e-5) * 0.5 * (1 + np.cos(np.pi * steps / 5000))
    assert rates.sum() == pytest.approx(0.775, abs=5e-4)
    _, columns = draw(6)
    rng = np.random.default_rng(7)
    h, b_dec, b_enc, c, k = rng.standard_normal(M), rng.standard_normal(M), rng.standard_normal(N), 3.7, 4

    def reconstruct(h: Array, b_dec: Array, b_enc: Array) -> Array:
        z = columns.T @ (h - b_dec) + b_enc
        x = np.where(z >= np.sort(z)[-k], np.maximum(z, 0), 0)
        return columns @ x + b_dec

    np.testing.assert_allclose(reconstruct(c * h, b_dec, b_enc) / c, reconstruct(h, b_dec / c, b_enc / c), atol=1e-12)


def test_p4_the_masked_least_squares_splits_by_rows() -> None:
    rows, _ = draw(8)
    mask = binary(rows).astype(bool)
    rng = np.random.default_rng(9)
    x, h = rng.standard_normal((300, N)), rng.standard_normal((300, M))
    split = np.zeros((M, N))
    for i in range(M):
        split[i, mask[i]] = np.linalg.lstsq(x[:, mask[i]], h[:, i], rcond=None)[0]
    # The whole problem at once: one unknown for each entry of the mask.
    entries = np.argwhere(mask)
    design = np.zeros((300 * M, len(entries)))
    for column, (i, j) in enumerate(entries):
        design[i::M, column] = x[:, j]
    whole = np.linalg.lstsq(design, h.ravel(), rcond=None)[0]
    np.testing.assert_allclose(split[mask], whole, atol=1e-9)
