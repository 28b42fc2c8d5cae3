"""The inner loops of the pursuits on a CPU, compiled by numba: one row of activations at a time.

Which atom correlates best is found in two stages. Correlations in float32, updated with a Gram matrix in
16-bit fixed point, come with a bound on their error; the atoms that the bound leaves in question, about
one, are settled by inner products in float64 with the true residual. So picks and coefficients are those
of a float64 pursuit, though nearly all of the memory traffic is in half precision; and a row's code does
not depend, bit for bit, on its batch, its chunk or the number of threads.

Loops are split as they are because each must be one that the compiler can vectorise: a running maximum
of floats is not, one of their bit patterns as integers (of the same order, for floats >= 0) is.
"""

from typing import Any

import numba
import numpy as np

GRAM_SCALE = 32767
"""What 1 is in the fixed-point Gram matrix."""

BLOCK = 512
"""Correlations updated, and their maximum kept, at a time: small enough for the nearest cache."""

REFRESH = 4
"""Correlations are computed anew from the residual once the largest is under this many error bounds."""

MAGNITUDE = np.int32(0x7FFFFFFF)
"""Bits of a float without its sign."""

# No infinities or NaN get here, sums may be reordered (always in the same way), products may be fused.
_FAST = {"nnan", "ninf", "nsz", "contract", "reassoc"}
_f4, _f8, _i4 = np.float32, np.float64, np.int32


def _jit(function: Any) -> Any:
    """Compile on first use, without the interpreter's lock; keep the result on disk where possible."""
    try:
        return numba.njit(nogil=True, fastmath=_FAST, cache=True)(function)
    except RuntimeError:  # no writable place for the cache
        return numba.njit(nogil=True, fastmath=_FAST)(function)


@_jit
def quantize(products, out):
    """Inner products of unit vectors, float32, into the fixed-point form."""
    for i in range(products.shape[0]):
        for j in range(products.shape[1]):
            out[i, j] = np.int16(np.rint(min(max(products[i, j], _f4(-1)), _f4(1)) * _f4(GRAM_SCALE)))


@_jit
def _dot(a, b):
    total = 0.0
    for i in range(a.shape[0]):
        total += _f8(a[i]) * _f8(b[i])
    return total


@_jit
def _subtract(a, b, c):
    for i in range(a.shape[0]):
        a[i] -= c * _f8(b[i])


@_jit
def _subtract_4(a, b0, b1, b2, b3, c0, c1, c2, c3):
    for i in range(a.shape[0]):
        a[i] -= (c0 * _f8(b0[i]) + c1 * _f8(b1[i])) + (c2 * _f8(b2[i]) + c3 * _f8(b3[i]))


@_jit
def _update(a, g, c):
    for i in range(a.shape[0]):
        a[i] -= c * _f4(g[i])


@_jit
def _update_8(a, g0, g1, g2, g3, g4, g5, g6, g7, c0, c1, c2, c3, c4, c5, c6, c7):
    for i in range(a.shape[0]):
        a[i] -= (
            (c0 * _f4(g0[i]) + c1 * _f4(g1[i])) + (c2 * _f4(g2[i]) + c3 * _f4(g3[i]))
        ) + ((c4 * _f4(g4[i]) + c5 * _f4(g5[i])) + (c6 * _f4(g6[i]) + c7 * _f4(g7[i])))  # fmt: skip


@_jit
def _top(bits, mask):
    """Largest of `bits & mask`, at least 0."""
    top = _i4(0)
    for i in range(bits.shape[0]):
        top = _i4(max(top, _i4(bits[i] & mask)))
    return top


@_jit
def _tops(bits, mask, tops):
    for b in range(tops.shape[0]):
        tops[b] = _top(bits[b * BLOCK : (b + 1) * BLOCK], mask)


@_jit
def _refresh(correlations, residual, atoms):
    """Correlations with the residual scaled to norm 1; returns the inverse of its norm."""
    inverse = 1 / np.sqrt(_dot(residual, residual))
    for i in range(atoms.shape[0]):
        correlations[i] = _f4(_dot(residual, atoms[i]) * inverse)
    return inverse


@_jit
def _pick(bits, mask, tops, error, residual, atoms, taken):
    """The atom not in `taken` of largest correlation with the residual (the first of equals), and it.

    Only atoms whose approximate correlation is within twice its `error` of the largest one can be.
    """
    word = np.empty(1, _i4)
    number = word.view(_f4)
    word[0] = _top(tops, MAGNITUDE)
    number[0] = max(number[0] - _f4(2 * error), _f4(1e-30))
    threshold = word[0]
    best, atom = 0.0, -1
    for b in range(tops.shape[0]):
        if tops[b] >= threshold:
            for i in range(b * BLOCK, min(bits.shape[0], (b + 1) * BLOCK)):
                if _i4(bits[i] & mask) >= threshold:
                    new = True
                    for t in taken:
                        new &= t != i
                    if new:
                        value = _dot(residual, atoms[i])
                        if value > abs(best) or (mask == MAGNITUDE and -value > abs(best)):
                            best, atom = value, i
    return atom, best


@_jit
def _largest(tops):
    word = np.empty(1, _i4)
    word[0] = _top(tops, MAGNITUDE)
    return word.view(_f4)[0]


@_jit
def matching_rows(
    first,
    last,
    correlations,
    x,
    energies,
    atoms,
    gram,
    signed,
    rtol,
    threshold,
    error_0,
    error_g,
    picks,
    coefficients,
):
    """Matching pursuit of rows `first` to `last`.

    Args:
        correlations: float32 [b, n], of the rows of x scaled to norm 1 with the atoms; overwritten.
        x: float64 [b, d].
        energies: float64 [b], squared norms of x.
        atoms: [n, d].
        gram: int16 [n, >= n], fixed point.
        threshold: a row stops before it picks an atom whose correlation is smaller.
        error_0: bound on the error of `correlations`.
        error_g: bound on the error of an entry of `gram`.
        picks: int64 [b, k], filled with -1; receives the atom of each step.
        coefficients: float64 [b, k], filled with 0.
    """  # fmt: skip
    n, k = correlations.shape[1], picks.shape[1]
    tops = np.empty((n + BLOCK - 1) // BLOCK, _i4)
    residual = np.empty(x.shape[1])
    nobody = np.empty(0, np.int64)
    mask = MAGNITUDE if signed else _i4(-1)
    for row in range(first, last):
        if energies[row] == 0:
            continue
        current = correlations[row]
        bits = current.view(_i4)
        residual[:] = x[row]
        error, inverse = error_0, 1 / np.sqrt(energies[row])
        _tops(bits, mask, tops)
        for t in range(k):
            if _largest(tops) < REFRESH * error:
                inverse = _refresh(current, residual, atoms)
                error = 1e-7  # one rounding to float32
                _tops(bits, mask, tops)
            atom, c = _pick(bits, mask, tops, error, residual, atoms, nobody)
            if atom < 0 or abs(c) < threshold:
                break
            picks[row, t] = atom
            coefficients[row, t] = c
            _subtract(residual, atoms[atom], c)
            if t + 1 == k or _dot(residual, residual) <= rtol * rtol * energies[row]:
                break
            error += abs(c) * inverse * error_g + 1e-7  # the last: rounding of the update itself
            scaled = _f4(c * inverse / GRAM_SCALE)
            for b in range(tops.shape[0]):
                low, high = b * BLOCK, min(n, (b + 1) * BLOCK)
                _update(current[low:high], gram[atom, low:high], scaled)
                tops[b] = _top(bits[low:high], mask)


@_jit
def orthogonal_rows(
    first, last, correlations, x, energies, atoms, gram, rtol, threshold, tolerance, error_0, error_g,
    picks, coefficients
):  # fmt: skip
    """Orthogonal matching pursuit (signed) of rows `first` to `last`; arguments as in `matching_rows`.

    With L the Cholesky factor of the support's inner products, `inverse_factor` is L^-1. Its new row m
    gives both the new direction q = m D_S, orthogonal to the old support, and the new coefficients,
    c + <q, x> m.

    Args:
        tolerance: squared distance from the span of the support under which an atom is inside it.
    """
    n, k = correlations.shape[1], picks.shape[1]
    tops = np.empty((n + BLOCK - 1) // BLOCK, _i4)
    residual = np.empty(x.shape[1])
    current = np.empty(n, _f4)
    bits = current.view(_i4)
    inverse_factor = np.zeros((k, k))
    cross, w, scaled = np.empty(k), np.empty(k), np.empty(k, _f4)
    for row in range(first, last):
        if energies[row] == 0:
            continue
        support, c = picks[row], coefficients[row]
        initial = correlations[row]
        scale = 1 / np.sqrt(energies[row])
        residual[:] = x[row]
        current[:] = initial
        error = error_0
        _tops(bits, MAGNITUDE, tops)
        for t in range(k):
            if _largest(tops) < REFRESH * error:
                _refresh(current, residual, atoms)
                error = 1e-7
                _tops(bits, MAGNITUDE, tops)
            atom, best = _pick(bits, MAGNITUDE, tops, error, residual, atoms, support[:t])
            if atom < 0 or abs(best) < threshold:
                break
            distance = _dot(atoms[atom], atoms[atom])
            for i in range(t):
                cross[i] = _dot(atoms[atom], atoms[support[i]])
            for i in range(t):
                w[i] = _dot(inverse_factor[i, : i + 1], cross[: i + 1])
                distance -= w[i] * w[i]
            if distance <= tolerance:
                break
            diagonal = 1 / np.sqrt(distance)
            new = inverse_factor[t]
            new[:t] = 0
            new[t] = diagonal
            for i in range(t):
                _subtract(new[: i + 1], inverse_factor[i, : i + 1], w[i] * diagonal)
            support[t] = atom
            n_used = t + 1
            _subtract(c[:n_used], new[:n_used], -best * diagonal)
            _residual(residual, x[row], atoms, support, c, n_used)
            if n_used == k or _dot(residual, residual) <= rtol * rtol * energies[row]:
                break
            error = error_0 + 1e-7
            for i in range(n_used):
                error += abs(c[i]) * scale * (error_g + n_used * 6e-8)
                scaled[i] = _f4(c[i] * scale / GRAM_SCALE)
            for b in range(tops.shape[0]):
                low, high = b * BLOCK, min(n, (b + 1) * BLOCK)
                current[low:high] = initial[low:high]
                _update_all(current[low:high], gram, support, scaled, n_used, low, high)
                tops[b] = _top(bits[low:high], MAGNITUDE)


@_jit
def _residual(out, x, atoms, support, c, n_used):
    """x less the sum of the support's atoms times c."""
    out[:] = x
    i = 0
    while i + 4 <= n_used:
        s = support[i : i + 4]
        _subtract_4(
            out, atoms[s[0]], atoms[s[1]], atoms[s[2]], atoms[s[3]], c[i], c[i + 1], c[i + 2], c[i + 3]
        )
        i += 4
    while i < n_used:
        _subtract(out, atoms[support[i]], c[i])
        i += 1


@_jit
def _update_all(out, gram, support, c, n_used, low, high):
    """Subtract columns `low` to `high` of the support's Gram rows, eight rows at a time."""
    i = 0
    while i + 8 <= n_used:
        s = support[i : i + 8]
        _update_8(
            out,
            gram[s[0], low:high], gram[s[1], low:high], gram[s[2], low:high], gram[s[3], low:high],
            gram[s[4], low:high], gram[s[5], low:high], gram[s[6], low:high], gram[s[7], low:high],
            c[i], c[i + 1], c[i + 2], c[i + 3], c[i + 4], c[i + 5], c[i + 6], c[i + 7],
        )  # fmt: skip
        i += 8
    while i < n_used:
        _update(out, gram[support[i], low:high], c[i])
        i += 1
