"""Orthogonal matching pursuit, signed (Pati et al., 1993)."""

import numpy as np

from itda_lens.pursuit.kernels.gram import GRAM_SCALE, pack_coefficients, pack_row, packed_sums
from itda_lens.pursuit.kernels.jit import jit
from itda_lens.pursuit.kernels.vectors import (
    BLOCK,
    MAGNITUDE,
    REFRESH,
    ROUNDING,
    block_tops,
    dot,
    in_question,
    largest,
    pick,
    refresh,
    squared_norm,
    subtract,
)

_f4, _f8, _i4 = np.float32, np.float64, np.int32


@jit
def orthogonal_rows(
    rows, correlations, x, energies, atoms, gram, slots, used, turn, rtol, threshold, tolerance, error_0,
    error_g, missing, picks, coefficients
):  # fmt: skip
    """Orthogonal matching pursuit of some rows of x; arguments as in `matching_rows`.

    Batch OMP (Rubinstein, Zibulevsky & Elad, 2008) by the inverse of L, the Cholesky factor of the
    support's inner products. Its new row m gives the new direction q = m D_S, orthogonal to the old
    support, and so the new coefficients, c + <q, x> m. The residual is formed only where the error bound
    leaves several atoms in question.

    Args:
        tolerance: squared distance from the span of the support under which an atom is inside it.
    """
    n, k, d = correlations.shape[1], picks.shape[1], x.shape[1]
    tops = np.empty((n + BLOCK - 1) // BLOCK, _i4)
    found = np.empty(n, np.int64)
    residual, new = np.empty(d), np.empty(d)
    current = np.empty(n, _f4)
    bits = current.view(_i4)
    inverse = np.empty((k, k))
    cross, m = np.empty(k), np.empty(k)
    packed = np.zeros((tops.shape[0], (k + 1) // 2, BLOCK), _i4)
    packed_c = np.empty((k + 1) // 2, _i4)
    sums = np.empty(BLOCK, _i4)
    for row in rows:
        missing[row] = -1
        picks[row] = -1
        coefficients[row] = 0
        if energies[row] == 0:
            continue
        support, c = picks[row], coefficients[row]
        initial = correlations[row]
        scale = 1 / np.sqrt(energies[row])
        current[:] = initial
        left, error = energies[row], error_0
        block_tops(bits, MAGNITUDE, tops)
        for t in range(k):
            if largest(tops) < REFRESH * error:
                _residual(residual, x, row, atoms, support, c, t)
                refresh(current, residual, atoms)
                error = ROUNDING
                block_tops(bits, MAGNITUDE, tops)
            n_found = in_question(bits, MAGNITUDE, tops, error, support, t, found)
            atom = found[0]
            if n_found != 1:
                _residual(residual, x, row, atoms, support, c, t)
                atom, _ = pick(found, n_found, MAGNITUDE, residual, atoms)
                if atom < 0:
                    break
            for i in range(d):
                new[i] = _f8(atoms[atom, i])
            _cross(new, atoms, support, t, cross)
            best = dot(new, x, row)
            for i in range(t):
                best -= c[i] * cross[i]
            if abs(best) < threshold:
                break
            distance = squared_norm(new)
            m[:t] = 0
            for i in range(t):
                w = 0.0
                for j in range(i + 1):
                    w += inverse[i, j] * cross[j]
                for j in range(i + 1):
                    m[j] -= w * inverse[i, j]
                distance -= w * w
            if distance <= tolerance:
                break
            m[t] = 1.0
            diagonal = 1 / np.sqrt(distance)
            step = best * diagonal
            support[t] = atom
            for i in range(t + 1):
                inverse[t, i] = diagonal * m[i]
                c[i] += step * inverse[t, i]
            left -= step * step
            if t + 1 == k or left <= rtol * rtol * energies[row]:
                break
            slot = slots[atom]
            if slot < 0:
                missing[row] = atom
                break
            if used[slot] != turn:
                used[slot] = turn
            pack_row(packed, t, gram, slot, n)
            unit, lost = pack_coefficients(c, t + 1, scale, packed_c)
            error = error_0 + ROUNDING + lost * np.sqrt(t + 1)
            for i in range(t + 1):
                error += abs(c[i]) * scale * error_g
            inverse_unit = _f4(1 / (unit * GRAM_SCALE))
            for b in range(tops.shape[0]):
                low, high = b * BLOCK, min(n, (b + 1) * BLOCK)
                packed_sums(sums, packed[b], packed_c, t // 2 + 1)
                tops[b] = _difference(current[low:high], initial[low:high], sums, inverse_unit)


@jit
def _cross(new, atoms, support, n, out):
    """Inner products of an atom with the first `n` of the support, four at a time."""
    i = 0
    while i + 4 <= n:
        s0, s1, s2, s3 = support[i], support[i + 1], support[i + 2], support[i + 3]
        a, b, c, d = 0.0, 0.0, 0.0, 0.0
        for j in range(new.shape[0]):
            a += new[j] * _f8(atoms[s0, j])
            b += new[j] * _f8(atoms[s1, j])
            c += new[j] * _f8(atoms[s2, j])
            d += new[j] * _f8(atoms[s3, j])
        out[i], out[i + 1], out[i + 2], out[i + 3] = a, b, c, d
        i += 4
    while i < n:
        out[i] = dot(new, atoms, support[i])
        i += 1


@jit
def _residual(out, x, row, atoms, support, c, n):
    """A row of x less the first `n` atoms of its support times c."""
    out[:] = x[row]
    for i in range(n):
        subtract(out, atoms, support[i], c[i])


@jit
def _difference(out, a, b, c):
    """a - b c; returns the largest magnitude, as bits."""
    found = _i4(0)
    for i in range(out.shape[0]):
        value = _f4(a[i] - c * _f4(b[i]))
        out[i] = value
        found = _i4(max(found, _i4(value.view(_i4) & MAGNITUDE)))
    return found
