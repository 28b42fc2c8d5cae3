"""The inner loops of the pursuits on a CPU, compiled by numba: one row of activations at a time.

Which atom correlates best is found in two stages. Correlations in float32, updated with a Gram matrix in
16-bit fixed point, come with a bound on their error; the atoms that the bound leaves in question, about
one, are settled by inner products in float64 with the true residual. So picks and coefficients are those
of a float64 pursuit, though nearly all of the memory traffic is in half precision; and a row's code does
not depend, bit for bit, on its batch, its chunk or the number of threads.

Loops are written as they are because each must be one that the compiler can vectorise. A running maximum
of floats is not, one of their bit patterns as integers (of the same order, for floats >= 0) is; and a
loop must begin at 0, or its index might be a negative one, which counts from the end: parts are sliced.

All of this is one file, because numba's cache on disk sees edits of a function's own file only.
"""

import logging
from contextlib import suppress
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.extending import intrinsic
from typing_extensions import override

log = logging.getLogger(__name__)

_f4, _f8, _i2, _i4 = np.float32, np.float64, np.int16, np.int32


# No infinities or NaN get here, sums may be reordered (always in the same way), products may be fused.
_FAST = {"nnan", "ninf", "nsz", "contract", "reassoc"}


class _Cache(FunctionCache):
    """numba's cache on disk, but one whose damaged files or full disk cost time only."""

    @override
    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # of reading, unpickling or linking: all kinds
            _tell("read", self.cache_path)
            log.debug("%r", error)
            with suppress(Exception):
                self.flush()  # or a damaged index would stay
            return None

    @override
    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _tell("written", self.cache_path)
            log.debug("%r", error)


@cache
def _tell(done: str, path: str) -> None:
    """Warn of the cache, once for all functions."""
    log.warning("numba's cache in %s cannot be %s; the pursuits are compiled anew", path, done)


def jit(function: Any) -> Any:
    """Compile on first use, without the interpreter's lock; keep the result on disk where possible."""
    # numpy's errors: with Python's a division may raise, and a loop that may raise is not vectorised.
    compiled: Any = numba.njit(nogil=True, fastmath=_FAST, error_model="numpy")(function)
    with suppress(RuntimeError):  # no writable place for the cache
        compiled._cache = _Cache(function)
    return compiled


# --- Gram matrices in fixed point, and sums of their rows by integer arithmetic

GRAM_SCALE = 32767
"""The integer that stands for 1 in the fixed-point Gram matrix."""

TILE = 64
"""Columns whose sums are in registers at once."""

LARGEST_SCALE = 60_000.0
"""The largest integer that may stand for 1 in fixed-point coefficients. A sum, at most 1, must stay
under 2**31 / 32767 = 65,538, with a margin for rounding. Partial sums may overflow, since integers wrap
round."""

_LANES = 8
"""32-bit numbers in a vector of AVX2; longer vectors gained nothing."""


@jit
def quantize(products, where, out):
    """Inner products of unit vectors, float32, into rows `where` of a matrix in fixed point."""
    for i in range(products.shape[0]):
        row = out[where[i]]
        for j in range(products.shape[1]):
            row[j] = _i2(np.rint(min(max(products[i, j], _f4(-1)), _f4(1)) * _f4(GRAM_SCALE)))


@jit
def pack_row(packed, slot, gram, row, n):
    """Copy `n` columns of a row of the Gram matrix into `packed` [n_blocks, pairs, block].

    Each 32-bit number holds two neighbouring slots, the even one in its lower half: a processor
    multiplies and adds such pairs in one instruction. An odd slot must come after its even one.
    """
    size = packed.shape[2]
    for b in range(packed.shape[0]):
        out = packed[b, slot // 2]
        values = gram[row, b * size : min(n, (b + 1) * size)]
        if slot % 2:
            for i in range(values.shape[0]):
                out[i] |= _i4(values[i]) << _i4(16)
        else:
            for i in range(values.shape[0]):
                out[i] = _i4(values[i]) & _i4(0xFFFF)


@jit
def pack_coefficients(c, n, scale, out):
    """The first `n` coefficients, times `scale`, as fixed-point pairs into `out`.

    Returns the integer that stands for 1 in them, and the norm of the rounding errors.
    """
    largest = 0.0
    for i in range(n):
        largest = max(largest, abs(c[i]) * scale)
    unit = min(GRAM_SCALE / largest, LARGEST_SCALE)
    lost = 0.0
    for i in range(n):
        exact = c[i] * scale * unit
        rounded = np.rint(exact)
        lost += (rounded - exact) ** 2
        if i % 2:
            out[i // 2] |= _i4(rounded) << 16
        else:
            out[i // 2] = _i4(rounded) & 0xFFFF
    return unit, np.sqrt(lost) / unit


@intrinsic
def _packed_sums(
    typingctx: Any, sums: Any, packed: Any, coefficients: Any, n_pairs: Any
) -> tuple[Any, Any]:
    """`packed_sums`, for one processor instruction to which loops in numba's language do not compile."""
    vector = ir.VectorType(ir.IntType(32), _LANES)
    halves = ir.VectorType(ir.IntType(16), 2 * _LANES)
    integer = ir.IntType(32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, rows, weights = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args, arguments, strict=True)
            if isinstance(kind, types.Array)
        )
        n_pairs = arguments[3]
        size = cgutils.unpack_tuple(builder, rows.shape)[1]
        has_avx2 = "+avx2" in context.codegen().magic_tuple()[2]

        def constant(value: int) -> Any:
            return ir.Constant(size.type, value)

        def splat(value: Any) -> Any:
            single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, integer(0))
            return builder.shuffle_vector(single, single, ir.Constant(vector, [0] * _LANES))

        def lower(value: Any) -> Any:
            by = ir.Constant(vector, [16] * _LANES)
            return builder.ashr(builder.shl(value, by), by)

        def upper(value: Any) -> Any:
            return builder.ashr(value, ir.Constant(vector, [16] * _LANES))

        def multiply(a: Any, b: Any) -> Any:
            if has_avx2:
                kind = ir.FunctionType(vector, [halves, halves])
                name = "llvm.x86.avx2.pmadd.wd"
                function = cgutils.get_or_insert_function(builder.module, kind, name)
                return builder.call(function, [builder.bitcast(a, halves), builder.bitcast(b, halves)])
            return builder.add(builder.mul(lower(a), lower(b)), builder.mul(upper(a), upper(b)))

        def vectors(numbers: Any, start: Any) -> Any:
            return builder.bitcast(builder.gep(numbers, [start]), vector.as_pointer())

        totals = [cgutils.alloca_once(builder, vector) for _ in range(TILE // _LANES)]
        with cgutils.for_range_slice(builder, constant(0), size, constant(TILE)) as (column, _):
            for total in totals:
                builder.store(ir.Constant(vector, [0] * _LANES), total)
            with cgutils.for_range(builder, n_pairs) as loop:
                weight = splat(builder.load(builder.gep(weights.data, [loop.index])))
                source = vectors(rows.data, builder.add(builder.mul(loop.index, size), column))
                for i, total in enumerate(totals):
                    row = builder.load(builder.gep(source, [constant(i)]), align=4)
                    builder.store(builder.add(builder.load(total), multiply(row, weight)), total)
            target = vectors(out.data, column)
            for i, total in enumerate(totals):
                builder.store(builder.load(total), builder.gep(target, [constant(i)]), align=4)
        return context.get_dummy_value()

    signature = types.void(sums, packed, coefficients, types.intp)
    return signature, generate


@jit
def packed_sums(sums, packed, coefficients, n_pairs):
    """Sums over slots of packed rows times packed coefficients, for one block of columns.

    Args:
        sums: int32 [block], receives them.
        packed: int32 [pairs, block]; an odd slot without a row may hold anything, its coefficient is 0.
        coefficients: int32 [>= n_pairs].
    """
    _packed_sums(sums, packed, coefficients, n_pairs)  # pyright: ignore[reportCallIssue]


# --- Vectors, and the search for the atom of largest correlation

BLOCK = 512
"""Correlations updated, and their maximum kept, at a time: small enough for the nearest cache."""

REFRESH = 4
"""Correlations are computed anew from the residual once the largest is under this many error bounds."""

ROUNDING = 2.4e-7
"""Bound on four roundings of a number below 1 to float32: those of an update of a correlation."""

CANCELLED = 1e-8
"""Once a residual has less than this share of its row's energy, its energy is computed, not tracked, in
float64."""

MAGNITUDE = np.int32(0x7FFFFFFF)
"""Bits of a float without its sign."""

_SEARCHED = 64
"""Correlations looked at one by one."""


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
    """Correlations with the residual scaled to norm 1 (or zero); returns the inverse of its norm."""
    left = squared_norm(residual)
    inverse = 1 / np.sqrt(left) if left > 0 else 0.0
    for i in range(atoms.shape[0]):
        correlations[i] = _f4(dot(residual, atoms, i) * inverse)
    return inverse


@jit
def in_question(bits, mask, tops, least, taken, n_taken, found):
    """The atoms, in order, whose number (its magnitude, or itself where positive: by `mask`) is `least`
    or more, but for the first `n_taken` of `taken`; returns how many.
    """
    threshold = _f4(max(least, 1e-30)).view(_i4)
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
    """The first atom of `found` with the largest correlation with the residual, or -1; and that
    correlation."""
    best, atom = 0.0, -1
    for i in range(n_found):
        value = dot(residual, atoms, found[i])
        if value > abs(best) or (mask == MAGNITUDE and -value > abs(best)):
            best, atom = value, found[i]
    return atom, best


# --- Matching pursuit (Mallat & Zhang, 1993)


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
            # What is within twice the error of the largest may be the largest.
            n_found = in_question(bits, mask, tops, largest(tops) - 2 * error, found, 0, found)
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
            error += abs(c) * inverse * error_g + ROUNDING
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


# --- Orthogonal matching pursuit (Pati et al., 1993), with and without signs


@jit
def orthogonal_rows(
    rows, correlations, x, energies, atoms, gram, slots, used, turn, signed, rtol, threshold, tolerance,
    error_0, error_g, missing, picks, coefficients
):  # fmt: skip
    """Orthogonal matching pursuit of some rows of x; arguments as in `matching_rows`.

    Batch OMP (Rubinstein, Zibulevsky & Elad, 2008) by the inverse of L, the Cholesky factor of the
    support's inner products. Its new row m gives the new direction q = m D_S, orthogonal to the old
    support, and so the new coefficients, c + <q, x> m. The residual is formed only where the error bound
    leaves several atoms in question.

    Without signs, the coefficients are the non-negative least-squares fit on all atoms picked so far
    (`_constrain`). An atom whose coefficient is zero keeps its place in `held`, with a row of zeros in
    `inverse`; it is no longer picked, but later fits may use it again.

    Args:
        tolerance: squared distance from the span of the support under which an atom is inside it.
            Without signs it is also the correlation, as a share of the row's norm, up to which an atom
            is not wanted.
    """
    n, k, d = correlations.shape[1], picks.shape[1], x.shape[1]
    tops = np.empty((n + BLOCK - 1) // BLOCK, _i4)
    found = np.empty(n, np.int64)
    residual = np.empty(d)
    current = np.empty(n, _f4)
    bits = current.view(_i4)
    mask = MAGNITUDE if signed else _i4(-1)
    held, inverse = np.empty((k, d)), np.empty((k, k))
    cross, m = np.empty(k), np.empty(k)
    products, targets = np.empty((k, k)), np.empty(k)
    positive = np.empty(k, np.bool_)
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
        floor = 0.0 if signed else tolerance / scale
        current[:] = initial
        left, error = energies[row], error_0
        block_tops(bits, mask, tops)
        for t in range(k):
            if largest(tops) < REFRESH * error:
                _residual(residual, x, row, held, c, t)
                refresh(current, residual, atoms)
                for i in range(t):
                    current[support[i]] = 0.0  # but for rounding, which must not hide the others
                error = ROUNDING
                block_tops(bits, mask, tops)
            n_found = in_question(bits, mask, tops, largest(tops) - 2 * error, support, t, found)
            atom = found[0]
            if n_found != 1:
                _residual(residual, x, row, held, c, t)
                atom, _ = pick(found, n_found, mask, residual, atoms)
                if atom < 0:
                    break
            new = held[t]
            best, distance = _beside(atom, atoms, x, row, held, inverse, c, t, new, cross, m)
            size = abs(best) if signed else best
            if size <= floor or size < threshold or distance <= tolerance:
                break
            step = best / np.sqrt(distance)
            support[t] = atom
            _hold(inverse, c, m, step, distance, t)
            left -= step * step
            if not signed:
                products[t, :t] = cross[:t]
                products[:t, t] = cross[:t]
                products[t, t] = squared_norm(new)
                targets[t], positive[t] = dot(new, x, row), True
                if _constrain(products, targets, positive, c, inverse, step, tolerance, floor, t + 1):
                    left = 0.0  # it is computed
            if left < CANCELLED * energies[row]:
                _residual(residual, x, row, held, c, t + 1)
                left = squared_norm(residual)
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
            for i in range(tops.shape[0]):
                # Back and forth: what the last step read last is still in the cache.
                b = i if t % 2 == 0 else tops.shape[0] - 1 - i
                low, high = b * BLOCK, min(n, (b + 1) * BLOCK)
                packed_sums(sums, packed[b], packed_c, t // 2 + 1)
                tops[b] = _difference(current[low:high], initial[low:high], sums, inverse_unit, mask)
        if not signed:
            for i in range(k):
                if c[i] <= 0:
                    support[i], c[i] = -1, 0.0


@jit
def _constrain(products, targets, positive, c, inverse, step, tolerance, floor, n):
    """Go on from the fit on `n` atoms, just extended by the last, to the non-negative fit on them.

    The active-set method of Lawson & Hanson (1974), begun where the fit before stopped. Nothing is done
    where the new fit is positive and wants no atom back that was dropped before.

    Args:
        products, targets: inner products of the atoms with each other, and with the row.
        positive: which atoms have a positive coefficient, the last included; updated.
        c: the fit on the positive atoms without a constraint; becomes the constrained one.
        inverse: inverse of the Cholesky factor of the positive atoms' products, with rows of zeros for
            the others; updated.
        step: how far the last atom moved the fit, along its row of `inverse`.
        floor: correlation up to which a dropped atom is not wanted back.

    Returns:
        whether anything was done.
    """
    if _all_positive(c, positive, n) and _wanted(products, targets, positive, c, floor, n) < 0:
        return False
    fit, entered = np.empty(n), -1
    for i in range(n):
        fit[i] = c[i]
        c[i] -= step * inverse[n - 1, i] if positive[i] else 0.0
    c[n - 1] = 0.0
    for _ in range(3 * n):  # each turn but the last drops an atom or lessens the error; a safeguard
        if _all_positive(fit, positive, n):
            c[:n] = fit
            entered = _wanted(products, targets, positive, c, floor, n)
            if entered < 0:
                break
            positive[entered] = True
            if not _factorise(products, positive, inverse, tolerance, n):
                positive[entered] = False  # it lies in the span of the others
                _factorise(products, positive, inverse, tolerance, n)
                break
        else:
            share = 1.0
            for i in range(n):
                if positive[i] and fit[i] <= 0:
                    share = min(share, c[i] / (c[i] - fit[i]) if c[i] > 0 else 0.0)
            for i in range(n):
                if positive[i]:
                    blocked = fit[i] <= 0 and c[i] <= share * (c[i] - fit[i])
                    c[i] += share * (fit[i] - c[i])
                    if blocked or c[i] <= 0:
                        positive[i], c[i] = False, 0.0
            _factorise(products, positive, inverse, tolerance, n)
        _solve(inverse, targets, positive, fit, n)
    return True


@jit
def _all_positive(values, positive, n):
    for i in range(n):  # noqa: SIM110 (numba compiles this)
        if positive[i] and values[i] <= 0:
            return False
    return True


@jit
def _wanted(products, targets, positive, c, floor, n):
    """The dropped atom that correlates most with the residual, by more than `floor`, or -1."""
    best, atom = floor, -1
    for i in range(n):
        if not positive[i]:
            value = targets[i]
            for j in range(n):
                value -= products[i, j] * c[j]
            if value > best:
                best, atom = value, i
    return atom


@jit
def _factorise(products, positive, inverse, tolerance, n):
    """The inverse of the Cholesky factor of the positive atoms' products, into the first `n` rows.

    Returns False if an atom is inside the span of those before it.
    """
    for i in range(n):
        inverse[i, : i + 1] = 0
        if not positive[i]:
            continue
        distance = products[i, i]
        for j in range(i):
            if positive[j]:
                w = 0.0
                for h in range(j + 1):
                    w += inverse[j, h] * products[i, h]
                for h in range(j + 1):
                    inverse[i, h] -= w * inverse[j, h]
                distance -= w * w
        if distance <= tolerance:
            return False
        diagonal = 1 / np.sqrt(distance)
        for h in range(i):
            inverse[i, h] *= diagonal
        inverse[i, i] = diagonal
    return True


@jit
def _solve(inverse, targets, positive, fit, n):
    """The least-squares fit on the positive atoms, from the inverse of their Cholesky factor."""
    fit[:n] = 0
    for i in range(n):
        if positive[i]:
            value = 0.0
            for j in range(i + 1):
                value += inverse[i, j] * targets[j]
            for j in range(i + 1):
                fit[j] += value * inverse[i, j]


@jit
def _beside(atom, atoms, x, row, held, inverse, c, n, new, cross, m):
    """How an atom stands to the `n` atoms held, whose rows in float64 are the first of `held`.

    Args:
        inverse: its first rows are the inverse of the Cholesky factor of the inner products held.
        c: coefficients of the least-squares fit of row `row` of x.
        new: receives the atom in float64.
        cross: scratch.
        m: receives the part of the atom that is orthogonal to the held ones, as coefficients of these
            and of itself.

    Returns:
        its correlation with the residual, and its squared distance from the span of those held.
    """
    for i in range(new.shape[0]):
        new[i] = _f8(atoms[atom, i])
    _cross(new, held, n, cross)
    correlation, distance = dot(new, x, row), squared_norm(new)
    for i in range(n):
        correlation -= c[i] * cross[i]
    m[:n] = 0
    for i in range(n):
        w = 0.0
        for j in range(i + 1):
            w += inverse[i, j] * cross[j]
        for j in range(i + 1):
            m[j] -= w * inverse[i, j]
        distance -= w * w
    m[n] = 1.0
    return correlation, distance


@jit
def _hold(inverse, c, m, step, distance, n):
    """Add the atom that `_beside` looked at to those held: a row of `inverse`, and the fit with it."""
    diagonal = 1 / np.sqrt(distance)
    for i in range(n + 1):
        inverse[n, i] = diagonal * m[i]
        c[i] += step * inverse[n, i]


@jit
def _cross(new, held, n, out):
    """Inner products of an atom with the first `n` of `held`, four at a time."""
    i = 0
    while i + 4 <= n:
        a, b, c, d = 0.0, 0.0, 0.0, 0.0
        for j in range(new.shape[0]):
            a += new[j] * held[i, j]
            b += new[j] * held[i + 1, j]
            c += new[j] * held[i + 2, j]
            d += new[j] * held[i + 3, j]
        out[i], out[i + 1], out[i + 2], out[i + 3] = a, b, c, d
        i += 4
    while i < n:
        out[i] = dot(new, held, i)
        i += 1


@jit
def _residual(out, x, row, held, c, n):
    """A row of x less the first `n` rows of `held` times c."""
    out[:] = x[row]
    for i in range(n):
        subtract(out, held, i, c[i])


@jit
def _difference(out, a, b, c, mask):
    """a - b c; returns the largest of the result's bits & mask, at least 0.

    Not `_subtract` after a copy: the copy costs OMP a sixth of its time at 4,096 atoms.
    """
    found = _i4(0)
    for i in range(out.shape[0]):
        value = _f4(a[i] - c * _f4(b[i]))
        out[i] = value
        found = _i4(max(found, _i4(value.view(_i4) & mask)))
    return found


# --- Orthogonal least squares (Chen, Billings & Luo, 1989), with a backward pass

TAKEN = 1e36
"""Stands in place of the squared distance from the span, for an atom that can no longer be picked."""

FEW_IN_QUESTION = 2
"""If more atoms than this are in question, exact correlations first reduce them: that takes one inner
product each and the residual, while looking at an atom takes one with each atom held."""


@jit
def least_squares_rows(
    rows, correlations, x, energies, atoms, gram, slots, used, turn, most, rtol, threshold, ahead,
    tolerance, error_0, error_g, missing, picks, coefficients
):  # fmt: skip
    """Orthogonal least squares of some rows of x; arguments as in `matching_rows`.

    Each step picks the atom that leaves least of the row once all coefficients are solved for again: by
    <r, d>**2 / p, where p is the atom's squared distance from the span of those held. Both are updated
    with the inner products of all atoms with the new direction q = m D_S (see `orthogonal_rows`), a sum
    of Gram rows. With bounds on the errors of both, every atom that could be best is looked at in
    float64, and its distance noted. Of `most` atoms, those without which least is lost are dropped
    again, one by one.

    Args:
        most: atoms held at once, at most.
        threshold: atoms that explain less than its square are dropped again, and so are those beyond k.
        ahead: a row stops before it picks an atom that explains less than this squared.
        tolerance: squared distance from the span up to which an atom is not picked.
    """
    n, d = correlations.shape[1], x.shape[1]
    tops = np.empty((n + BLOCK - 1) // BLOCK, _i4)
    found, support = np.empty(n, np.int64), np.empty(most, np.int64)
    residual = np.empty(d)
    exact, since = np.empty(n), np.empty(n)
    current, distances, scores = np.empty(n, _f4), np.empty(n, _f4), np.empty(n, _f4)
    bits = scores.view(_i4)
    held, inverse, c = np.empty((most, d)), np.empty((most, most)), np.empty(most)
    cross, m, best_m = np.empty(most), np.empty(most), np.empty(most)
    packed = np.zeros((tops.shape[0], (most + 1) // 2, BLOCK), _i4)
    packed_m = np.empty((most + 1) // 2, _i4)
    sums = np.empty(BLOCK, _i4)
    for row in rows:
        missing[row] = -1
        picks[row] = -1
        coefficients[row] = 0
        if energies[row] == 0:
            continue
        current[:] = correlations[row]
        distances[:] = 1
        since[:] = 0  # what `squares` was when an atom's distance was exact
        c[:] = 0
        left, scale, n_held = energies[row], 1 / np.sqrt(energies[row]), 0
        error, squares = error_0, 0.0
        error_p = ROUNDING
        _rescore(scores, current, distances, error, error_p, tolerance, tops)
        while n_held < most:
            top = _first_top(bits, tops)
            if abs(current[top]) < REFRESH * error and error > ROUNDING:
                _residual(residual, x, row, held, c, n_held)
                scale = refresh(current, residual, atoms)
                error = ROUNDING
                _rescore(scores, current, distances, error, error_p, tolerance, tops)
                continue
            # No less than this is what the best atom explains, as a share of what `scale` is of.
            farthest = max(distances[top] + error_p, tolerance)
            least = max(abs(current[top]) - error, 0.0) ** 2 / farthest
            n_found = in_question(bits, MAGNITUDE, tops, least, support, 0, found)
            if n_found > FEW_IN_QUESTION:
                _residual(residual, x, row, held, c, n_held)
                n_found, top = _by_exact_correlation(
                    residual, atoms, distances, since, squares, n_held, tolerance, found, n_found, exact
                )
            atom, step, distance, retry = -1, 0.0, 1.0, False
            for i in range(n_found):
                one, apart = _beside(
                    found[i], atoms, x, row, held, inverse, c, n_held, held[n_held], cross, m
                )
                if apart <= tolerance:
                    distances[found[i]] = TAKEN
                    retry |= found[i] == top  # it must not say what others have to reach
                    continue
                if n_found > 1:  # what is not picked is often in question again
                    distances[found[i]], since[found[i]] = apart, squares
                if atom < 0 or one * one * distance > step * step * apart:
                    atom, step, distance = found[i], one, apart
                    best_m[: n_held + 1] = m[: n_held + 1]
            if retry:
                _rescore(scores, current, distances, error, error_p, tolerance, tops)
                continue
            step /= np.sqrt(distance)
            if atom < 0 or step == 0 or abs(step) < ahead:
                break
            t = n_held
            n_held += 1
            support[t] = atom
            for i in range(d):
                held[t, i] = _f8(atoms[atom, i])
            _hold(inverse, c, best_m, step, distance, t)
            distances[atom] = TAKEN
            left -= step * step
            if left < CANCELLED * energies[row]:
                _residual(residual, x, row, held, c, n_held)
                left = squared_norm(residual)
            if n_held == most or left <= rtol * rtol * energies[row]:
                break
            slot = slots[atom]
            if slot < 0:
                missing[row] = atom
                break
            if used[slot] != turn:
                used[slot] = turn
            pack_row(packed, t, gram, slot, n)
            unit, lost = pack_coefficients(inverse[t], n_held, 1.0, packed_m)
            error_q = ROUNDING + lost * np.sqrt(n_held)
            for i in range(n_held):
                error_q += abs(inverse[t, i]) * error_g
            squares += error_q * error_q
            error += abs(step) * scale * error_q + ROUNDING
            error_p = _distance_error(squares, n_held)
            inverse_unit, scaled = _f4(1 / (unit * GRAM_SCALE)), _f4(step * scale)
            for i in range(tops.shape[0]):
                b = i if t % 2 == 0 else tops.shape[0] - 1 - i  # back and forth, as in OMP
                low, high = b * BLOCK, min(n, (b + 1) * BLOCK)
                packed_sums(sums, packed[b], packed_m, t // 2 + 1)
                tops[b] = _project_out(
                    scores[low:high], current[low:high], distances[low:high], sums, inverse_unit, scaled,
                    _f4(error), _f4(error_p), _f4(tolerance),
                )  # fmt: skip
        if missing[row] < 0:
            _drop_least(inverse, c, n_held, threshold, support, picks[row], coefficients[row])


@jit
def _distance_error(squares, n_held):
    """Bound on the error of a squared distance, from the squared errors of the products that made it.

    By the Cauchy-Schwarz inequality, since the squares of an atom's products with directions sum to 1 at
    most.
    """
    return 2 * np.sqrt(squares) + squares + ROUNDING * (n_held + 1)


@jit
def _by_exact_correlation(
    residual, atoms, distances, since, squares, n_held, tolerance, found, n_found, explained
):  # fmt: skip
    """Leave those `found` that may be best by their exact correlation and the bound on their distance.

    That bound grows from when the distance was exact; it is often the same atoms that are in question.
    Returns how many are left, and the one that explains most for certain.
    """
    top, least = -1, -1.0
    for i in range(n_found):
        correlation = dot(residual, atoms, found[i])
        explained[i] = correlation * correlation
        error = _distance_error(squares - since[found[i]], n_held)
        certain = explained[i] / max(distances[found[i]] + error, tolerance)
        if certain > least:
            top, least = found[i], certain
    n_left = 0
    for i in range(n_found):
        error = _distance_error(squares - since[found[i]], n_held)
        if explained[i] / max(distances[found[i]] - error, tolerance) >= least:
            found[n_left] = found[i]
            n_left += 1
    return n_left, top


@jit
def _at_most(correlation, distance, error, error_p, tolerance):
    """Upper bound on how much an atom explains, if it may be picked; all in float32."""
    most = _f4(abs(correlation) + error)
    return _f4(most * most / max(_f4(distance - error_p), tolerance))


@jit
def _rescore(scores, correlations, distances, error, error_p, tolerance, tops):
    """Upper bounds on how much each atom explains."""
    e, p, floor = _f4(error), _f4(error_p), _f4(tolerance)
    for i in range(scores.shape[0]):
        scores[i] = _at_most(correlations[i], distances[i], e, p, floor)
    block_tops(scores.view(_i4), MAGNITUDE, tops)


@jit
def _project_out(scores, correlations, distances, sums, unit, step, error, error_p, tolerance):
    """`_rescore` of a block once a direction is held, of which `sums * unit` are the inner products."""
    found = _i4(0)
    for i in range(scores.shape[0]):
        product = unit * _f4(sums[i])
        correlation = _f4(correlations[i] - step * product)
        distance = _f4(distances[i] - product * product)
        correlations[i], distances[i] = correlation, distance
        value = _f4(_at_most(correlation, distance, error, error_p, tolerance))
        scores[i] = value
        found = _i4(max(found, value.view(_i4)))
    return found


@jit
def _first_top(bits, tops):
    """The first index of the largest of `bits`, whose blocks have these tops."""
    best = _i4(-1)
    block = 0
    for b in range(tops.shape[0]):
        if tops[b] > best:
            best, block = tops[b], b
    for i in range(block * BLOCK, min(bits.shape[0], (block + 1) * BLOCK)):
        if bits[i] == best:
            return i
    return block * BLOCK  # never: the top of a block is one of its numbers


@jit
def _drop_least(inverse, c, n, threshold, support, picks, coefficients):
    """Drop held atoms, the one without which least is lost first; write down what is left.

    Atoms are dropped while there are more than `picks` has room for, or one explains less than
    `threshold` squared.
    """
    products = np.zeros((n, n))  # inverse of the matrix of inner products
    for t in range(n):
        for i in range(t + 1):
            for j in range(t + 1):
                products[i, j] += inverse[t, i] * inverse[t, j]
    n_left = n
    while n_left:
        worst, least = -1, np.inf
        for i in range(n):
            if products[i, i] > 0:
                loss = c[i] * c[i] / products[i, i]
                if loss < least:
                    worst, least = i, loss
        if worst < 0 or (n_left <= picks.shape[0] and least >= threshold * threshold):
            break
        n_left -= 1
        pivot = products[worst, worst]
        for i in range(n):
            if i != worst and products[i, i] > 0:
                share = products[i, worst] / pivot
                c[i] -= share * c[worst]
                for j in range(n):
                    products[i, j] -= share * products[worst, j]
        products[worst, worst] = 0
    kept = 0
    for i in range(n):
        if products[i, i] > 0:
            picks[kept], coefficients[kept] = support[i], c[i]
            kept += 1
