"""Vectors, and the search for the atom of largest correlation.

Loops are written as they are because each must be one that the compiler can vectorise. A running maximum
of floats is not, one of their bit patterns as integers (of the same order, for floats >= 0) is; and a
loop must begin at 0, or its index might be a negative one, which counts from the end: parts are sliced.
"""

import numpy as np

from itda_lens.pursuit.kernels.jit import jit

BLOCK = 512
"""Correlations updated, and their maximum kept, at a time: small enough for the nearest cache."""

REFRESH = 4
"""Correlations are computed anew from the residual once the largest is under this many error bounds."""

ROUNDING = 1e-7
"""Bound on one rounding of a number below 1 to float32."""

MAGNITUDE = np.int32(0x7FFFFFFF)
"""Bits of a float without its sign."""

_SEARCHED = 64
"""Correlations looked at one by one."""

_f4, _f8, _i4 = np.float32, np.float64, np.int32


@jit
def squared_norm(a):
    total = 0.0
    for i in range(a.shape[0]):
        total += a[i] * a[i]
    return total


@jit
def dot(a, rows, row):
    total = 0.0
    for i in range(a.shape[0]):
        total += a[i] * _f8(rows[row, i])
    return total


@jit
def subtract(a, rows, row, c):
    """a -= c rows[row]; returns the squared norm of the result."""
    total = 0.0
    for i in range(a.shape[0]):
        a[i] -= c * _f8(rows[row, i])
        total += a[i] * a[i]
    return total


@jit
def top(bits, mask):
    """Largest of `bits & mask`, at least 0."""
    found = _i4(0)
    for i in range(bits.shape[0]):
        found = _i4(max(found, _i4(bits[i] & mask)))
    return found


@jit
def block_tops(bits, mask, tops):
    for b in range(tops.shape[0]):
        tops[b] = top(bits[b * BLOCK : (b + 1) * BLOCK], mask)


@jit
def largest(tops):
    return _i4(top(tops, MAGNITUDE)).view(_f4)


@jit
def refresh(correlations, residual, atoms):
    """Correlations with the residual scaled to norm 1; returns the inverse of its norm."""
    inverse = 1 / np.sqrt(squared_norm(residual))
    for i in range(atoms.shape[0]):
        correlations[i] = _f4(dot(residual, atoms, i) * inverse)
    return inverse


@jit
def in_question(bits, mask, tops, error, taken, n_taken, found):
    """The atoms, in order, that may be the one of largest correlation; returns how many.

    These are the ones whose approximate correlation is within twice its `error` of the largest one, but
    for the first `n_taken` of `taken`.
    """
    threshold = _f4(max(largest(tops) - _f4(2 * error), _f4(1e-30))).view(_i4)
    n, n_found = bits.shape[0], 0
    for b in range(tops.shape[0]):
        if tops[b] >= threshold:
            for low in range(b * BLOCK, min(n, (b + 1) * BLOCK), _SEARCHED):
                if top(bits[low : low + _SEARCHED], mask) >= threshold:
                    for i in range(low, min(n, low + _SEARCHED)):
                        if _i4(bits[i] & mask) >= threshold:
                            new = True
                            for t in range(n_taken):
                                new &= taken[t] != i
                            if new:
                                found[n_found] = i
                                n_found += 1
    return n_found


@jit
def pick(found, n_found, mask, residual, atoms):
    """Of the atoms `found`, the first of largest correlation with the residual, or -1; and its own."""
    best, atom = 0.0, -1
    for i in range(n_found):
        value = dot(residual, atoms, found[i])
        if value > abs(best) or (mask == MAGNITUDE and -value > abs(best)):
            best, atom = value, found[i]
    return atom, best
