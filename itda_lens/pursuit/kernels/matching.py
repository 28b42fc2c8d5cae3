"""Matching pursuit (Mallat & Zhang, 1993)."""

import numpy as np

from itda_lens.pursuit.kernels.gram import GRAM_SCALE
from itda_lens.pursuit.kernels.jit import jit
from itda_lens.pursuit.kernels.vectors import (
    BLOCK,
    MAGNITUDE,
    REFRESH,
    ROUNDING,
    block_tops,
    in_question,
    largest,
    pick,
    refresh,
    subtract,
)

_f4, _i4 = np.float32, np.int32


@jit
def matching_rows(
    rows, correlations, x, energies, atoms, gram, slots, used, turn, signed, rtol, threshold, error_0,
    error_g, missing, picks, coefficients
):  # fmt: skip
    """Matching pursuit of some rows of x.

    Args:
        rows: int64, which rows.
        correlations: float32 [b, n], of the rows of x scaled to norm 1 with the atoms.
        x: float64 [b, d].
        energies: float64 [b], squared norms of x.
        atoms: [n, d].
        gram: int16 [m, >= n], rows of the Gram matrix in fixed point.
        slots: int64 [n], the row of `gram` of each atom, -1 where it is not there.
        used: int64 [m], receives `turn` for each row of `gram` that is read.
        threshold: a row stops before it picks an atom whose correlation is smaller.
        error_0: bound on the error of `correlations`.
        error_g: bound on the error of an entry of `gram`.
        missing: int64 [b], receives the atom whose row of the Gram matrix a pursuit had to end for, to
            be begun again; -1 where it was completed.
        picks: int64 [b, k], receives the atom of each step; -1 once it has ended.
        coefficients: float64 [b, k]; 0 once it has ended.
    """
    n, k = correlations.shape[1], picks.shape[1]
    current = np.empty(n, _f4)
    bits = current.view(_i4)
    tops = np.empty((n + BLOCK - 1) // BLOCK, _i4)
    residual = np.empty(x.shape[1])
    found = np.empty(n, np.int64)
    mask = MAGNITUDE if signed else _i4(-1)
    for row in rows:
        missing[row] = -1
        picks[row] = -1
        coefficients[row] = 0
        if energies[row] == 0:
            continue
        current[:] = correlations[row]
        residual[:] = x[row]
        error, inverse = error_0, 1 / np.sqrt(energies[row])
        block_tops(bits, mask, tops)
        for t in range(k):
            if largest(tops) < REFRESH * error:
                inverse = refresh(current, residual, atoms)
                error = ROUNDING
                block_tops(bits, mask, tops)
            n_found = in_question(bits, mask, tops, error, found, 0, found)
            atom, c = pick(found, n_found, mask, residual, atoms)
            if atom < 0 or abs(c) < threshold:
                break
            picks[row, t] = atom
            coefficients[row, t] = c
            left = subtract(residual, atoms, atom, c)
            if t + 1 == k or left <= rtol * rtol * energies[row]:
                break
            slot = slots[atom]
            if slot < 0:
                missing[row] = atom
                break
            if used[slot] != turn:
                used[slot] = turn
            error += abs(c) * inverse * error_g + ROUNDING  # the last: of the update itself
            scaled = _f4(c * inverse / GRAM_SCALE)
            for b in range(tops.shape[0]):
                low, high = b * BLOCK, min(n, (b + 1) * BLOCK)
                tops[b] = _subtract(current[low:high], gram[slot, low:high], scaled, mask)


@jit
def _subtract(correlations, products, c, mask):
    """Subtract products times c; returns the largest of the result's bits & mask, at least 0."""
    found = _i4(0)
    for i in range(correlations.shape[0]):
        value = _f4(correlations[i] - c * _f4(products[i]))
        correlations[i] = value
        found = _i4(max(found, _i4(value.view(_i4) & mask)))
    return found
