"""Combinatorial decoders that bear noise: medians instead of equality (SMP, SSMP), or its probability (Robust-ℓ0).

As :mod:`expander_sae.pursuit.combinatorial`, these recover sparse codes from expander measurements; they are no
encoders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expander_sae.dictionary import Dictionary, Matrix
from expander_sae.pursuit import selection
from expander_sae.pursuit.code import PursuitCode
from expander_sae.pursuit.combinatorial import expander_only, finish, memory_cells, neighbours
from expander_sae.pursuit.least_squares import solve_support
from expander_sae.pursuit.problem import Problem, Solution, run, supports


def smp(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    steps: int = 40,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """Sparse matching pursuit (Berinde, Indyk & Ružić 2008): ``x ← H_k(x + H_2k(u))``.

    ``u_j`` is the median ratio ``r_i / w_ij`` of column ``j``. The best iterate is returned: at large
    ``k`` the parallel update overshoots. ``iterations`` counts steps.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return run(lambda problem: _smp(problem, steps), h, expander_only(dictionary), k, b_dec, cells=memory_cells)


def ssmp(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    factor: int = 2,
    rounds: int = 4,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """Sequential sparse matching pursuit (Berinde & Indyk 2009).

    Single updates, each the one that lowers ``‖r‖₁`` most; after every ``factor · k`` of them the ``k`` largest
    coefficients are kept. ``iterations`` counts updates.
    """
    if factor < 1 or rounds < 1:
        raise ValueError(f"factor and rounds must be at least 1, got {factor} and {rounds}")
    matrix = expander_only(dictionary)
    return run(lambda problem: _ssmp(problem, factor, rounds), h, matrix, k, b_dec, cells=memory_cells)


def _enough(problem: Problem) -> Tensor:
    """``(B,)``: the ``‖r‖₁`` of a sample that is done."""
    return problem.floor * problem.targets.shape[1] ** 0.5


def _keep_largest(x: Tensor, count: int) -> Tensor:
    _, features = selection.best(x.abs(), min(count, x.shape[1]))
    return torch.zeros_like(x).scatter(1, features, x.gather(1, features))


def _weighted_median(ratios: Tensor, weights: Tensor) -> Tensor:
    """The minimiser of ``Σ_t |w_t| · |ratio_t - z|`` along the last axis; 0 for a column of zeros."""
    order = ratios.nan_to_num().sort(dim=-1)
    mass = weights.abs().expand_as(ratios).gather(-1, order.indices).cumsum(dim=-1)
    middle = (mass < mass[..., -1:] / 2).sum(dim=-1, keepdim=True).clamp_max(ratios.shape[-1] - 1)
    return order.values.gather(-1, middle).squeeze(-1)


def _smp(problem: Problem, steps: int) -> Solution:
    matrix, targets, k = problem.matrix, problem.targets, problem.k
    combine = matrix.synthesis()
    x = targets.new_zeros(problem.batch, matrix.d_sae)
    best_x, residual = x, targets
    least, enough = targets.abs().sum(dim=1), _enough(problem)
    rounds = torch.zeros(problem.batch, dtype=torch.int64, device=targets.device)
    live = least > enough
    for _ in range(steps):
        if not bool(live.any()):
            break
        _, ratios = neighbours(matrix, residual)
        update = _keep_largest(_weighted_median(ratios, matrix.values), 2 * k)
        x = torch.where(live.unsqueeze(1), _keep_largest(x + update, k), x)
        residual = targets - combine(x)
        length = residual.abs().sum(dim=1)
        improved = live & (length < least)
        best_x = torch.where(improved.unsqueeze(1), x, best_x)
        rounds += live
        # A step that makes things much worse has begun to diverge.
        live = live & (length < 2 * least) & (length > enough)
        least = torch.where(improved, length, least)
    return finish(problem, best_x, rounds)


def _ssmp(problem: Problem, factor: int, rounds: int) -> Solution:
    matrix, targets, k = problem.matrix, problem.targets, problem.k
    combine = matrix.synthesis()
    x = targets.new_zeros(problem.batch, matrix.d_sae)
    best_x, residual = x, targets
    least, enough = targets.abs().sum(dim=1), _enough(problem)
    updates = torch.zeros(problem.batch, dtype=torch.int64, device=targets.device)
    live = least > enough
    for _ in range(rounds):
        moving = live
        for _ in range(factor * k):
            if not bool(moving.any()):
                break
            entries, ratios = neighbours(matrix, residual)
            proposal = _weighted_median(ratios, matrix.values)
            drop = (entries.abs() - (entries - proposal.unsqueeze(-1) * matrix.values).abs()).sum(dim=-1)
            strength, column = selection.best(drop, 1)
            moving = moving & (strength[:, 0] > enough / targets.shape[1])
            amount = torch.where(moving.unsqueeze(1), proposal.gather(1, column), 0.0)
            x.scatter_add_(1, column, amount)
            residual = residual - amount * matrix.columns(column.squeeze(1))
            updates += moving
        x = torch.where(live.unsqueeze(1), _keep_largest(x, k), x)
        residual = targets - combine(x)
        length = residual.abs().sum(dim=1)
        improved = live & (length < least)
        best_x = torch.where(improved.unsqueeze(1), x, best_x)
        live = improved & (length > enough)
        least = torch.where(improved, length, least)
    return finish(problem, best_x, updates)


def robust_l0(
    h: Tensor,
    dictionary: Matrix | Dictionary,
    k: int,
    *,
    noise: float = 0.01,
    alpha: float | None = None,
    steps: int | None = None,
    b_dec: Tensor | None = None,
) -> PursuitCode:
    """Robust-ℓ0, after Mendoza-Smith, Tanner & Wechsung (2017, arXiv 1704.09012): Parallel-ℓ0 with probabilities.

    Coefficients are taken as Gaussian with variance ``‖h‖² / k`` and noise as Gaussian with ``noise · ‖h‖ / √m`` a row.
    An entry counts with its posterior probability of being equal to the proposal, less that of having been zero. The
    update is the average of the ratios that agree. The support is refitted by least squares at the end.

    Args:
        noise: norm of the noise as a fraction of ``‖h‖``.
        alpha: expected zeros a proposal must gain; default ``0.4 d``.
        steps: the most passes; default ``8 d``.
        h, dictionary, k, b_dec: as :func:`~expander_sae.pursuit.omp.omp`.
    """
    if not 0 < noise < 1:
        raise ValueError(f"noise is a fraction of the sample's norm, between 0 and 1; got {noise}")
    matrix = expander_only(dictionary)
    degree = supports(matrix).shape[1]
    gain = 0.4 * degree if alpha is None else alpha
    passes = steps or 8 * degree
    return run(lambda problem: _robust(problem, noise, gain, passes), h, matrix, k, b_dec, cells=memory_cells)


def _robust(problem: Problem, noise: float, gain: float, steps: int) -> Solution:
    matrix, targets, k = problem.matrix, problem.targets, problem.k
    combine, degree = matrix.synthesis(), supports(matrix).shape[1]
    length = targets.norm(dim=1)
    sigma2 = ((noise * length) ** 2 / matrix.d_in + problem.floor**2)[:, None, None]
    signal2 = (length**2 / k)[:, None, None]
    weights = matrix.values
    usual2 = weights.square().mean()
    x = targets.new_zeros(problem.batch, matrix.d_sae)
    best_x, residual, least = x, targets, length
    rounds = torch.zeros(problem.batch, dtype=torch.int64, device=targets.device)
    quiet = torch.zeros_like(rounds)
    live = length > problem.floor
    posterior = _posterior
    for step in range(steps):
        if not bool(live.any()):
            break
        # How crowded rows still are: columns left a row, as a Poisson rate.
        left = (k - (x != 0).sum(dim=1)).clamp_min(1)[:, None, None] * degree / matrix.d_in
        alone = torch.exp(-left)
        entries, ratios = neighbours(matrix, residual)
        zero = posterior(entries, sigma2, sigma2 + usual2 * signal2, alone)
        place = step % degree
        proposal = ratios[..., place].nan_to_num()
        reference = torch.where(weights[:, place] == 0, 1.0, weights[:, place])
        spread = sigma2 * (1 + (weights / reference.unsqueeze(1)).square())
        equal = posterior(entries - proposal.unsqueeze(-1) * weights, spread, spread + 2 * usual2 * signal2, alone)
        mean = (equal * weights * entries).sum(dim=-1) / (equal * weights.square()).sum(dim=-1).clamp_min(1e-20)
        accepted = ((equal - zero).sum(dim=-1) >= gain) & live.unsqueeze(1)
        x = _keep_largest(x + torch.where(accepted, mean, 0.0), k)
        residual = targets - combine(x)
        norm = residual.norm(dim=1)
        improved = live & (norm < least)
        best_x = torch.where(improved.unsqueeze(1), x, best_x)
        least = torch.where(improved, norm, least)
        rounds += live
        quiet = torch.where(improved, 0, quiet + 1)
        live = live & (quiet < 2 * degree) & (norm > problem.floor)
    solution = finish(problem, best_x, rounds)
    values, used = solve_support(problem, solution.features, solution.used)
    return solution._replace(values=values, used=used)


def _posterior(value: Tensor, narrow: Tensor, wide: Tensor, prior: Tensor) -> Tensor:
    """Probability that a Gaussian value came from variance ``narrow`` rather than ``wide``, given the prior for it."""
    log_odds = 0.5 * (wide / narrow).log() - 0.5 * value.square() * (1 / narrow - 1 / wide)
    return torch.sigmoid(log_odds + prior.logit(eps=1e-6))
