"""Gram matrices in fixed point, and sums of their rows by integer arithmetic."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from itda_lens.pursuit.kernels.jit import jit

GRAM_SCALE = 32767
"""What 1 is in the fixed-point Gram matrix."""

TILE = 64
"""Columns whose sums are in registers at once; their rows lie side by side in a packed matrix."""

LARGEST_SCALE = 60_000.0
"""What 1 may be, at most, in fixed-point coefficients: a sum, at most 1, must stay under 2**31 / 32767 =
65,538, with a margin for rounding. Partial sums may overflow, since integers wrap round."""

_LANES = 8
"""32-bit numbers in a vector of AVX2; longer vectors gained nothing."""

_f4, _i2, _i4 = np.float32, np.int16, np.int32


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

    Each 32-bit number holds two neighbouring slots, the even one in its lower half: what a processor
    multiplies and adds in one instruction. An odd slot must come after its even one.
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

    Returns what 1 is in them, and the norm of what rounding changed.
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
    """`packed_sums`, which loops in numba's language do not compile to the instruction for."""
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
