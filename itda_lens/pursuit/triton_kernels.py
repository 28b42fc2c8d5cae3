"""Matching pursuit on a GPU, compiled by Triton: one program a row of activations, all steps in one.

The algorithm is that of the loops for CPUs (`kernels.py`): correlations in float32, updated with a Gram
matrix in 16-bit fixed point, carry a bound on their error; atoms that the bound leaves in question are
settled by inner products in float64 with the true residual, which stays in registers. Updating the
correlations and looking for the largest is one pass. A program keeps, for each of its lanes, the largest
score, its atom and the next score: most often they show that one atom alone is in question.
"""

import triton
import triton.language as tl


@triton.jit
def _score(value, SIGNED: tl.constexpr):
    return tl.abs(value) if SIGNED else value


@triton.jit
def _best_two(first, second, where, score, i):
    """Each lane's largest score, its atom and the next score, with one more score a lane."""
    second = tl.maximum(second, tl.minimum(first, score))
    where = tl.where(score > first, i, where)
    return tl.maximum(first, score), second, where


@triton.jit
def _correlation(residual, atoms, atom, d, features):
    """Inner product of the residual with one atom, in float64."""
    row = tl.load(atoms + atom.to(tl.int64) * d + features, mask=features < d, other=0.0)
    return tl.sum(residual * row.to(tl.float64))


@triton.jit
def _next_in_question(correlations, n, after, bound, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest atom above `after` with a score of at least `bound`; n if there is none."""
    lowest = tl.full([BLOCK], n, tl.int32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        score = _score(tl.load(correlations + i, mask=i < n, other=0.0), SIGNED)
        chosen = (i < n) & (i > after) & (score >= bound)
        lowest = tl.minimum(lowest, tl.where(chosen, i, n))
    return tl.min(lowest)


@triton.jit
def _refresh(correlations, residual, inverse, atoms, n, d, features, ROWS: tl.constexpr):
    """Correlations with the residual times `inverse`, computed anew."""
    for start in range(0, n, ROWS):
        i = start + tl.arange(0, ROWS)
        inside = (i < n)[:, None] & (features < d)[None, :]
        rows = tl.load(atoms + i.to(tl.int64)[:, None] * d + features[None, :], mask=inside, other=0.0)
        found = tl.sum(rows.to(tl.float64) * residual[None, :], axis=1) * inverse
        tl.store(correlations + i, found.to(tl.float32), mask=i < n)


@triton.jit
def matching_rows(
    correlations, x, energies, atoms, gram, picks, coefficients,
    n, d, k, pitch, rtol, threshold, error_0, error_g,
    SIGNED: tl.constexpr, GRAM_SCALE: tl.constexpr, REFRESH: tl.constexpr, ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Matching pursuit of row `program_id(0)`.

    Args:
        correlations: float32 [b, n], of the rows of x scaled to norm 1 with the atoms; overwritten.
        x: [b, d].
        energies: float64 [b], squared norms of x.
        atoms: [n, d].
        gram: int16 [n, >= n] in fixed point, `pitch` numbers from row to row.
        picks: int64 [b, k], filled with -1; receives the atom of each step.
        coefficients: float64 [b, k], filled with 0.
        rtol, threshold, error_0: of float64, one number each, like error_g: Triton would pass Python's
            numbers in float32. `kernels.matching_rows` explains their meaning.
        GRAM_SCALE, REFRESH, ROUNDING: see `kernels`.
        BLOCK: correlations looked at at once.
        BLOCK_D: a power of two, at least d.
        ROWS: atoms at once where correlations are computed anew.
    """
    row = tl.program_id(0).to(tl.int64)
    correlations += row * n
    features = tl.arange(0, BLOCK_D)
    residual = tl.load(x + row * d + features, mask=features < d, other=0.0).to(tl.float64)
    energy = tl.load(energies + row)
    least = tl.load(threshold)
    enough = tl.load(rtol) * tl.load(rtol) * energy
    error_per_atom = tl.load(error_g)
    error = tl.load(error_0)
    inverse = 1.0 / tl.sqrt(tl.where(energy > 0, energy, 1.0))
    scaled = (0.0 * energy).to(tl.float32)
    atom = 0
    t = 0
    going = energy > 0
    while going & (t < k):
        # What the last pick changes, and the best of the result.
        products = gram + atom.to(tl.int64) * pitch
        first = tl.full([BLOCK], -1.0, tl.float32)
        second = tl.full([BLOCK], -1.0, tl.float32)
        where = tl.full([BLOCK], 0, tl.int32)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            value = tl.load(correlations + i, mask=i < n, other=0.0)
            value -= scaled * tl.load(products + i, mask=i < n, other=0).to(tl.float32)
            tl.store(correlations + i, value, mask=i < n)
            score = tl.where(i < n, _score(value, SIGNED), -1.0)
            first, second, where = _best_two(first, second, where, score, i)
        tl.debug_barrier()  # what one thread stored, another may load
        if tl.max(first) < REFRESH * error:
            left = tl.sum(residual * residual)
            inverse = tl.where(left > 0, 1.0 / tl.sqrt(tl.where(left > 0, left, 1.0)), 0.0)
            _refresh(correlations, residual, inverse, atoms, n, d, features, ROWS)
            tl.debug_barrier()
            error = error * 0.0 + ROUNDING
            first = tl.full([BLOCK], -1.0, tl.float32)
            second = tl.full([BLOCK], -1.0, tl.float32)
            for start in range(0, n, BLOCK):
                i = start + tl.arange(0, BLOCK)
                value = tl.load(correlations + i, mask=i < n, other=0.0)
                score = tl.where(i < n, _score(value, SIGNED), -1.0)
                first, second, where = _best_two(first, second, where, score, i)

        # The atoms that may be the best, in order.
        bound = tl.maximum(tl.max(first) - (2 * error).to(tl.float32), 1e-30)
        candidates = tl.sum((first >= bound).to(tl.int32)) + tl.sum((second >= bound).to(tl.int32))
        candidate = tl.min(tl.where(first >= bound, where, n))
        if candidates > 1:
            candidate = _next_in_question(correlations, n, -1, bound, SIGNED, BLOCK)
        c = 0.0 * energy
        chosen = -1
        while candidate < n:
            value = _correlation(residual, atoms, candidate, d, features)
            better = _score(value, SIGNED) > tl.abs(c)
            c = tl.where(better, value, c)
            chosen = tl.where(better, candidate, chosen)
            if candidates > 1:
                candidate = _next_in_question(correlations, n, candidate, bound, SIGNED, BLOCK)
            else:
                candidate = n

        going = (chosen >= 0) & (tl.abs(c) >= least)
        if going:
            atom = chosen
            tl.store(picks + row * k + t, atom.to(tl.int64))
            tl.store(coefficients + row * k + t, c)
            values = tl.load(atoms + atom.to(tl.int64) * d + features, mask=features < d, other=0.0)
            residual -= c * values.to(tl.float64)
            going = tl.sum(residual * residual) > enough
            error += tl.abs(c) * inverse * error_per_atom + ROUNDING
            scaled = (c * inverse / GRAM_SCALE).to(tl.float32)
        t += 1
