"""Masks of bounded overlap: supports are the graphs of polynomials over a finite field.

Take ``d`` points ``x_b`` of a field of ``q >= d`` elements. Row ``(b, y)`` stands for "the value at ``x_b`` is ``y``";
the column of a polynomial ``f`` of degree below ``t`` uses the ``d`` rows ``(b, f(x_b))``. Two polynomials agree in at
most ``t - 1`` points, so two columns share at most ``t - 1`` rows. The ``q`` columns ``f + c`` share none and use every
row once: a *parallel class*. Columns come class by class, so that row degrees differ little. Which slopes ``c_1``
come first is drawn: where not all are needed, consecutive ones are far from an expander (docs/masks.md).

Sources: Reed & Solomon 1960; as matrices for compressed sensing DeVore 2007; ``t = 2`` is the array code (Fan 2000).
"""

from __future__ import annotations

from math import isqrt

import numpy as np

from expander_sae.mask.draws import permutation

_CHUNK_ENTRIES = 1 << 22
_TRIED = 64  # polynomials for each column, before a field is given up


def reed_solomon(m: int, n: int, d: int, seed: int, overlap: int | None = None, permute: bool = True) -> np.ndarray:
    """Two columns share at most ``overlap`` rows; over the integers modulo a prime ``q`` near ``m / d``.

    ``q`` rarely divides ``m`` to ``d``. Either ``q`` is the next prime above ``m / d``, the surplus rows are left out
    and with them the columns that use one; or it is the next below, and each left-over row replaces one entry in
    columns of one parallel class, which share nothing else. Both keep the bound. Of those with enough columns the one
    with the smaller spread of row degrees is taken.

    Args:
        overlap: refuse if columns would share more; it is always the least with enough columns.
        permute: the seed shuffles rows and slopes; else block ``b`` is a range of rows, slopes come in order, and the
            seed does nothing.

    Raises:
        ValueError: sizes that do not fit, with the bound they break and what would fit.
    """
    _check_overlap(overlap, d)
    if d * d > m:
        raise ValueError(
            f"a reed-solomon mask needs degree <= q <= d_in / degree for its field of q elements: degree {d} is above "
            f"{isqrt(m)}, the largest for d_in = {m}"
        )
    # Polynomials come in one order for every t, so a larger t only goes on where a smaller one ran out of them.
    terms = [t for t in range(1, d + 1) if min(_fields(m, d)) ** (t - 1) < _TRIED * n]
    found = ((t, _reed_solomon(m, n, d, t, seed if permute else None)) for t in terms)
    smallest, rows = next(((t - 1, rows) for t, rows in found if rows is not None), (None, None))
    if smallest is None or rows is None or (overlap is not None and overlap < smallest):
        asked = d - 1 if overlap is None else overlap
        raise ValueError(_too_many(m, n, d, asked, max(_fields(m, d)) ** (asked + 1), smallest))
    return _placed(rows, m, seed, permute)


def gf2(m: int, n: int, d: int, seed: int, overlap: int | None = None, permute: bool = True) -> np.ndarray:
    """As :func:`reed_solomon` over the field of ``q = m / d`` elements, a power of two; nothing is left over.

    Every row degree is ``n / q`` if ``q`` divides ``n``. Without ``permute`` column ``j`` has the coefficients of its
    number, ``c_i`` the ``i``-th digit to base ``q``, and uses the rows ``b·q + (c_0 XOR a_b·c_1 XOR a_b²·c_2 …)`` with
    ``a_b = b``, products in the field: rows can be computed instead of stored.

    Args:
        overlap: refuse if columns would share more; it is always the least with enough columns.
        permute: the seed shuffles rows and slopes; else it does nothing.

    Raises:
        ValueError: sizes that do not fit, with the bound they break and what would fit.
    """
    _check_overlap(overlap, d)
    q, rest = divmod(m, d)
    if rest or q & (q - 1) or q < d:
        degrees = [str(e) for e in range(1, isqrt(m) + 1) if m % e == 0 and (m // e) & (m // e - 1) == 0]
        raise ValueError(
            f"a gf2 mask needs d_in / degree to be a power of two that is at least degree: degree {d} does not fit "
            f"d_in = {m}; {' and '.join(degrees) + ' would' if degrees else 'no degree does, use reed-solomon'}"
        )
    smallest = next((t - 1 for t in range(1, d + 1) if n <= q**t), None)
    if smallest is None or (overlap is not None and overlap < smallest):
        asked = d - 1 if overlap is None else overlap
        raise ValueError(_too_many(m, n, d, asked, q ** (asked + 1), smallest))
    modulus = irreducible(q.bit_length() - 1)
    number, points = np.arange(n, dtype=np.int64), np.arange(d, dtype=np.int64)
    group = _class_order(-(-n // q), q, seed if permute else None)[number // q]
    value = np.zeros((n, d), dtype=np.int64)
    for power in reversed(range(smallest)):  # Horner, but for the last step: times the point, plus c_0
        value = multiply(value ^ (group // q**power % q)[:, None], points, modulus)
    value ^= (number % q)[:, None]
    return _placed((points * q + value).astype(np.int32), m, seed, permute)


def johnson_bound(m: int, d: int, overlap: int) -> int:
    """The most columns of ``d`` rows among ``m`` that pairwise share at most ``overlap`` (Johnson 1962)."""
    bound = 1
    for shared in reversed(range(overlap + 1)):
        bound = bound * (m - shared) // (d - shared)
    return bound


def multiply(a: np.ndarray, b: np.ndarray, modulus: int) -> np.ndarray:
    """Products in GF(2^r): polynomials over GF(2) as bits of integers, modulo ``modulus`` of degree ``r``."""
    degree = modulus.bit_length() - 1
    product = np.zeros(np.broadcast_shapes(a.shape, b.shape), dtype=np.int64)
    a = a.astype(np.int64)
    for bit in range(degree):
        product ^= np.where(b >> bit & 1, a, 0)
        a = a << 1
        a ^= np.where(a >> degree & 1, modulus, 0)
    return product


def irreducible(degree: int) -> int:
    """The smallest irreducible polynomial of that degree over GF(2), as bits: ``x`` for degree 1, 1 for degree 0."""
    return next(
        candidate
        for candidate in range(1 << degree, 2 << degree)
        if all(_remainder(candidate, divisor) for divisor in range(2, 1 << (degree // 2 + 1)))
    )


def _remainder(a: int, b: int) -> int:
    while a.bit_length() >= b.bit_length():
        a ^= b << (a.bit_length() - b.bit_length())
    return a


def _check_overlap(overlap: int | None, d: int) -> None:
    if overlap is None:
        return
    if isinstance(overlap, bool) or not isinstance(overlap, int) or not 0 <= overlap < d:
        raise ValueError(f"overlap must be an integer from 0 to degree - 1 = {d - 1}, got {overlap!r}")


def _too_many(m: int, n: int, d: int, overlap: int, most: int, smallest: int | None) -> str:
    johnson = johnson_bound(m, d, overlap)
    if n > johnson:
        reason = f"no mask at all has more than {johnson:,} columns (Johnson's bound)"
    else:
        reason = f"there are q**{overlap + 1} = {most:,} polynomials, less those on rows that are left out"
    fits = f"; overlap={smallest} fits these sizes" if smallest is not None else "; a smaller d_sae would"
    return f"overlap {overlap} is not to be had with d_in = {m}, d_sae = {n}, degree = {d}: {reason}{fits}"


def _placed(rows: np.ndarray, m: int, seed: int, permute: bool) -> np.ndarray:
    if permute:
        rows = permutation(seed, 0, m)[rows]
    rows.sort(axis=1)
    return rows


def _fields(m: int, d: int) -> list[int]:
    """The next primes ``q >= d`` from ``m / d`` up and down."""
    above = next(q for q in range(max(d, -(-m // d)), 2 * m + 3) if _is_prime(q))
    below = next((q for q in range(m // d, d - 1, -1) if _is_prime(q)), above)
    return sorted({above, below}, reverse=True)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))


def _class_order(count: int, q: int, seed: int | None) -> np.ndarray:
    """int64 ``(count,)``: numbers of parallel classes in the order they are taken.

    The digits of a number to base ``q`` are the coefficients ``c_1``, ``c_2``, …: only the first is shuffled, so that
    the higher ones change as rarely as they can. All slopes for one value of those share one row at most.
    """
    number = np.arange(count, dtype=np.int64)
    return number if seed is None else number - number % q + permutation(seed, 1, q)[number % q]


def _reed_solomon(m: int, n: int, d: int, t: int, seed: int | None) -> np.ndarray | None:
    """The better fit, rows in blocks; ``None`` if neither has ``n`` columns."""
    found = [rows for q in _fields(m, d) if n <= q**t and (rows := _fit(m, n, d, t, q, seed)) is not None]
    return min(found, key=lambda rows: np.ptp(np.bincount(rows.ravel(), minlength=m)), default=None)


def _fit(m: int, n: int, d: int, t: int, q: int, seed: int | None) -> np.ndarray | None:
    """``n`` columns over F_q on ``m`` rows, by leaving rows out or by filling left-over ones."""
    surplus = max(0, d * q - m)
    heights = q - surplus // d - (np.arange(d) < surplus % d)  # rows that a block keeps, from the first
    offsets = np.cumsum(heights) - heights
    kept, count = [], 0
    classes = _class_order(min(q ** (t - 1), -(-_TRIED * n // q**2) * q), q, seed)
    chunk = min(max(1, _CHUNK_ENTRIES // (q * d)), 1 + n // q)
    for start in range(0, len(classes), chunk):
        values = _classes(classes[start : start + chunk], d, t, q)
        values = values[(values < heights).all(axis=1)]
        kept.append(values + offsets)
        count += len(values)
        if count >= n:
            break
    if count < n:
        return None
    rows = np.concatenate(kept)[:n].astype(np.int32)
    return rows if _fill(rows, m, d, t, q) else None


def _classes(numbers: np.ndarray, d: int, t: int, q: int) -> np.ndarray:
    """Values ``(len(numbers)·q, d)`` of the polynomials of these parallel classes at the points ``0 … d - 1``.

    Inside a class ``c_0`` runs.
    """
    points = np.arange(d, dtype=np.int64)
    value = np.zeros((len(numbers), d), dtype=np.int64)
    for power in reversed(range(t - 1)):
        value = (value + (numbers // q**power % q)[:, None]) * points % q
    return ((value[:, None, :] + np.arange(q)[:, None]) % q).reshape(-1, d)


def _fill(rows: np.ndarray, m: int, d: int, t: int, q: int) -> bool:
    """Give the rows from ``d·q`` on to entries of ``rows``, in place; whether there were classes enough.

    One left-over row goes to columns of one class only: they share no other row.
    """
    spare = max(0, m - d * q)
    n = len(rows)
    size = min(q, n)  # of a class; only whole ones are used
    share = 1 if t == 1 else min(size, max(1, n * d // m))  # columns for each left-over row
    per_class = size // share
    classes = n // size
    needed = -(-spare // per_class)
    if needed > classes:
        return False
    for number in range(spare):
        group, part = divmod(number, per_class)
        first = group * (classes // needed) * size + part * share
        column = np.arange(first, first + share)
        rows[column, (column + number) % d] = d * q + number
    return True
