"""The exact dictionary update: with the codes fixed, least squares for the whole decoder (docs/theory.md P4).

On a mask the problem splits by rows. Row ``i`` of ``W`` has only the ``D_i`` entries of the columns that use it (about
``D = n·d/m``), so ``min Σ_t ‖h_t - b - W x_t‖²`` is ``m`` independent ``D_i x D_i`` systems: the method of optimal
directions (Engan, Aase & Husøy 1999) for masked dictionaries. A dense dictionary has one ``n x n`` system with ``m``
right-hand sides. Activations are streamed; what is kept is the systems, ``Σ D_i²`` values (dense: ``n²``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from expander_sae import ops
from expander_sae.data.sources import ActivationSource
from expander_sae.dictionary import unit_rows
from expander_sae.ops import SparseCode
from expander_sae.ops.reference import accumulate_dtype
from expander_sae.sae import SAE

_SOLVED_AT_ONCE = 1 << 22  # matrix entries


@dataclass(frozen=True)
class DictionaryUpdate:
    """What an update did.

    Attributes:
        scales: ``(n,)``, norms that the new columns had before they were brought back to unit norm; 1 where nothing was
            rescaled. Codes found before the update fit the new columns after multiplication with them.
        fires: int64 ``(n,)``, how often each feature was used.
        rows: activations read.
    """

    scales: Tensor
    fires: Tensor
    rows: int


@torch.no_grad()
def refit_dictionary(
    sae: SAE,
    source: ActivationSource,
    *,
    rows: int | None = None,
    batch_size: int = 1024,
    ridge: float = 1e-2,
    seed: int = 0,
    start_step: int = 0,
) -> DictionaryUpdate:
    """Set ``W`` and ``b_dec`` to the least-squares solution for the codes that ``sae`` gives now, in place.

    Any encoder will do: only its codes are used. A unit-norm dictionary has its columns normalised afterwards; their
    norms belong to the codes, which the next encoding finds anew. A feature that was never used keeps its column.
    The squared error of these codes cannot rise. That of freshly found codes usually falls, but nothing guarantees
    it, least of all for a TopK encoder, whose ``b_enc`` stays behind.

    Args:
        sae: its dictionary and ``b_dec`` are changed.
        source: activations of width ``sae.d_in``.
        rows: activations to read; ``None`` for one pass over all of them, in order.
        batch_size: activations encoded at once.
        ridge: ``λ ‖W - W_old‖²`` is added to the squared error, ``λ`` this multiple of the mean energy ``Σ_t x_tj²`` of
            the features in use: it holds back features of which few samples speak, and keeps the systems regular.
            Above 0.
        seed, start_step: which ``rows``: those of
            :meth:`~expander_sae.data.sources.ActivationSource.batches` from batch ``start_step``.

    Raises:
        ValueError: wrong width, sizes out of range, a ``ridge`` that is not positive or too small for the
            arithmetic, or activations that are not finite.
    """
    if source.d_in != sae.d_in:
        raise ValueError(f"the activations have width {source.d_in}, the SAE reads d_in = {sae.d_in}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge must be positive, got {ridge}: without it a feature that was not used has no solution")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    systems = _Systems(sae)
    for h in _batches(source, rows, batch_size, seed, start_step):
        h = h.to(sae.b_dec.device, sae.dtype)
        code = sae.encode(h)
        systems.add(code, sae.dictionary.coordinates(h - sae.decode(code)))
    change, bias = systems.solve(ridge)
    if systems.dense:
        change = sae.dictionary.restrict(torch.arange(sae.d_sae, device=change.device), change)
    scales = _install(sae, change)
    sae.b_dec += sae.dictionary.vectors(bias.to(sae.dtype))
    return DictionaryUpdate(scales, systems.fires, systems.count)


def alternate(
    sae: SAE,
    source: ActivationSource,
    rounds: int,
    *,
    rows: int,
    batch_size: int = 1024,
    ridge: float = 1e-2,
    resample_below: int = 5,
    seed: int = 0,
) -> Iterator[DictionaryUpdate]:
    """Learn a dictionary without gradients: encode, :func:`refit_dictionary`, again; each round on other activations.

    Between rounds features with fewer than ``resample_below`` fires are re-aimed at residuals on their support, as in
    training. Yields after each round, so that a caller can measure and stop. Arguments and errors otherwise as
    :func:`refit_dictionary`.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = -(-rows // min(batch_size, rows))
    for number in range(rounds):
        options = {"rows": rows, "batch_size": batch_size, "seed": seed, "start_step": number * steps}
        update = refit_dictionary(sae, source, ridge=ridge, **options)
        idle = (update.fires < resample_below).nonzero().squeeze(1)
        if len(idle) and number + 1 < rounds:
            h = next(source.batches(min(batch_size, rows), seed, (number + 1) * steps)).to(sae.b_dec.device, sae.dtype)
            with torch.no_grad():
                residual = h - sae(h)
            energy = residual.square().sum(dim=1)
            if bool(energy.any()):
                chosen = torch.multinomial(energy.cpu().double(), len(idle), replacement=True, generator=generator)
                sae.reset_features(idle, residual[chosen.to(residual.device)])
        yield update


def _batches(
    source: ActivationSource, rows: int | None, batch_size: int, seed: int, start_step: int
) -> Iterator[Tensor]:
    if rows is None:
        for start in range(0, len(source), batch_size):
            yield source.rows(slice(start, start + batch_size))
        return
    for h in source.batches(min(batch_size, rows), seed, start_step):
        yield h[:rows]
        rows -= len(h)
        if rows <= 0:
            return


def _install(sae: SAE, change: Tensor) -> Tensor:
    """Add ``change`` to the columns, back to unit norm if the dictionary has it; returns the scales."""
    dictionary = sae.dictionary
    old = unit_rows(dictionary.values) if dictionary.unit_norm else dictionary.values
    new = old + change.to(old.dtype)
    scales = torch.ones_like(new[:, 0])
    if dictionary.unit_norm:
        norms = new.norm(dim=1)
        usable = norms > torch.finfo(norms.dtype).tiny ** 0.5
        scales = torch.where(usable, norms, 1.0)
        new = torch.where(usable.unsqueeze(1), new / scales.unsqueeze(1), old)
    dictionary.values.copy_(new)
    return scales


class _Systems:
    """Normal equations for the *change* of the columns, a group of entries each.

    A group is a row of ``W`` with the entries of the columns that use it, or all columns of a dense dictionary. On the
    right-hand side stand residuals, not activations: the ridge then pulls to the old values, and nothing cancels.
    """

    def __init__(self, sae: SAE) -> None:
        dictionary = sae.dictionary
        held = dictionary.held
        device, dtype = sae.b_dec.device, accumulate_dtype(sae.dtype)
        self.d_sae = sae.d_sae
        support = dictionary.core().support
        self.dense = support is None
        if support is None:
            self.rows, self.groups = torch.zeros(sae.d_sae, 1, dtype=torch.int64, device=device), 1
        else:
            self.rows, self.groups = support.long(), sae.d_in
        flat = self.rows.flatten()
        self.held = torch.ones_like(self.rows, dtype=torch.bool) if held is None else held  # padding has no unknowns
        there = self.held.flatten().nonzero().squeeze(1)
        self.sizes = torch.bincount(flat[there], minlength=self.groups)  # D_i
        self.entries = there[flat[there].argsort(stable=True)]  # entry j·d + t, group by group
        self.starts = self.sizes.cumsum(0) - self.sizes
        place = torch.zeros_like(flat)
        place[self.entries] = torch.arange(len(there), device=device)
        self.place = (place - self.starts[flat]).reshape(self.rows.shape)  # of an entry within its group
        self.offsets = self.sizes.square().cumsum(0) - self.sizes.square()
        self.gram = torch.zeros(int(self.sizes.square().sum()), dtype=dtype, device=device)
        width = sae.d_in if self.dense else self.rows.shape[1]
        self.right = torch.zeros(sae.d_sae, width, dtype=dtype, device=device)  # Σ_t x_tj r_t on the column's entries
        self.code = torch.zeros(sae.d_sae, dtype=dtype, device=device)  # Σ_t x_tj
        self.residual = torch.zeros(sae.d_in, dtype=dtype, device=device)  # Σ_t r_t
        self.energy = torch.zeros_like(self.code)
        self.fires = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.count = 0

    def add(self, code: SparseCode, residual: Tensor) -> None:
        """Codes ``(B, k)`` and what they leave, ``(B, m)``."""
        self.count += residual.shape[0]
        self.residual += residual.sum(dim=0)
        values = code.values.to(self.gram.dtype)
        if self.dense:
            self.right.addmm_(code.to_dense(self.d_sae).to(residual.dtype).T, residual.to(self.gram.dtype))
        else:
            self.right += ops.values_grad(residual, code.indices, code.values, self.rows.to(torch.int32))
        sample, slot = (values != 0).nonzero(as_tuple=True)  # empty slots name feature 0
        feature, x = code.indices[sample, slot].long(), values[sample, slot]
        self.fires += torch.bincount(feature, minlength=self.d_sae)
        self.code.index_add_(0, feature, x)
        self.energy.index_add_(0, feature, x.square())
        self._add_products(sample, feature, x)

    def _add_products(self, sample: Tensor, feature: Tensor, x: Tensor) -> None:
        """``x_j x_l`` for every two active entries that meet in a group: only those few, not ``D²`` a sample."""
        group = self.rows[feature]
        there = self.held[feature]
        key, order = (sample.unsqueeze(1) * self.groups + group)[there].sort()
        group, place = group[there][order], self.place[feature][there][order]
        x = x.unsqueeze(1).expand(-1, self.rows.shape[1])[there][order]
        size, offset = self.sizes[group], self.offsets[group]
        self.gram.index_add_(0, offset + place * (size + 1), x.square())
        for apart in range(1, len(key)):
            first = (key[apart:] == key[:-apart]).nonzero().squeeze(1)
            if not len(first):
                break
            second = first + apart
            product = x[first] * x[second]
            self.gram.index_add_(0, offset[first] + place[first] * size[first] + place[second], product)
            self.gram.index_add_(0, offset[first] + place[second] * size[first] + place[first], product)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The change of the columns, as they are stored, and of ``b_dec``."""
        change, bias = torch.zeros_like(self.right), self.residual / self.count
        used = self.fires > 0
        if not bool(used.any()):
            return change, bias
        weight = ridge * float(self.energy[used].mean())
        order = self.sizes.argsort(descending=True)  # groups of like size together: little padding
        order = order[self.sizes[order] > 0]
        for part in order.split(max(1, _SOLVED_AT_ONCE // int(self.sizes.max()) ** 2)):
            self._solve(part, weight, change, bias)
        return change, bias

    def _solve(self, part: Tensor, weight: float, change: Tensor, bias: Tensor) -> None:
        """The groups ``part``, padded to one size; the bias is eliminated: it is the mean of what the columns leave."""
        span = torch.arange(int(self.sizes[part].max()), device=part.device)
        size = self.sizes[part].unsqueeze(1)
        inside = span < size
        entry = self.entries[(self.starts[part].unsqueeze(1) + span).clamp_max(len(self.entries) - 1)]
        code = torch.where(inside, self.code[entry // self.rows.shape[1]], 0.0).double()
        if self.dense:
            right, total = self.right.unsqueeze(0).double(), self.residual.unsqueeze(0).double()
        else:
            right = torch.where(inside, self.right.flatten()[entry], 0.0).unsqueeze(2).double()
            total = self.residual[part].unsqueeze(1).double()
        gram = self._padded(part, span, inside)
        gram -= code.unsqueeze(2) * code.unsqueeze(1) / self.count
        gram.diagonal(dim1=1, dim2=2).add_(weight)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed.any()):
            raise ValueError(
                f"the normal equations of {int((failed > 0).sum())} rows are singular in this arithmetic: raise ridge"
            )
        found = torch.cholesky_solve(right - code.unsqueeze(2) * total.unsqueeze(1) / self.count, factor)
        left = (total - (code.unsqueeze(1) @ found).squeeze(1)) / self.count
        if self.dense:
            change.copy_(found[0])
            bias.copy_(left[0])
        else:
            change.view(-1)[entry[inside]] = found.squeeze(2)[inside].to(change.dtype)
            bias[part] = left.squeeze(1).to(bias.dtype)

    def _padded(self, part: Tensor, span: Tensor, inside: Tensor) -> Tensor:
        """``(P, D, D)`` in float64, zero in the padding."""
        if len(part) == 1:
            start, size = int(self.offsets[part]), len(span)
            return self.gram[start : start + size**2].view(1, size, size).double()
        rows = self.offsets[part].unsqueeze(1) + span * self.sizes[part].unsqueeze(1)
        places = (rows.unsqueeze(2) + span).clamp_max(len(self.gram) - 1)
        return torch.where(inside.unsqueeze(1) & inside.unsqueeze(2), self.gram[places], 0.0).double()
