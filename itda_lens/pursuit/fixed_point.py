"""Inner products in 16-bit fixed point."""

import os
import threading
from typing import Any

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from itda_lens.pursuit.precision import FLOAT32_UNIT, float32_products, product_error

PRODUCT_ROWS = 256
"""Rows that are computed in float32 at a time, before they are rounded."""

_compiling = threading.Lock()
"""Held while the kernels are imported: numba's decorators are not meant to race."""


def _after_fork() -> None:
    global _compiling
    _compiling = threading.Lock()  # a thread that the child does not have may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def compiled_loops() -> Any:
    """The module of compiled loops, imported when it is first needed."""
    with _compiling:
        from itda_lens.pursuit import kernels
    return kernels


def fixed_point(
    a: Float[Tensor, "m d"],
    b: Float[Tensor, "n d"],
    out: Int16[Tensor, "c n"] | None = None,
    where: Int[Tensor, " m"] | None = None,
) -> Int16[Tensor, "c n"]:
    """Inner products of unit rows as int16, `round(32767 <a, b>)`.

    Rounding moves each by at most 1.6e-5 from its float32 product.

    Args:
        out: the matrix to write to, which is returned; default: a new one with a row for each row of
            `a`.
        where: the row of `out` for each row of `a`; in order by default.
    """
    if out is None:
        out = torch.empty(len(a), len(b), dtype=torch.int16, device=a.device)
    if where is None:
        where = torch.arange(len(a), device=a.device)
    a, b = a.detach(), b.detach().float()
    for rows, targets in zip(a.split(PRODUCT_ROWS), where.split(PRODUCT_ROWS), strict=True):
        _quantize(float32_products(rows, b), targets, out)
    return out


def fixed_point_gram(atoms: Float[Tensor, "n d"]) -> Int16[Tensor, "n n"]:
    """`fixed_point(atoms, atoms)`, of which one half is computed and the other is its mirror image."""
    n = len(atoms)
    atoms = atoms.detach().float()
    out = torch.empty(n, n, dtype=torch.int16, device=atoms.device)
    places = torch.arange(n, device=atoms.device)
    for start in range(0, n, PRODUCT_ROWS):
        end = min(n, start + PRODUCT_ROWS)
        _quantize(float32_products(atoms[start:end], atoms[:end]), places[start:end], out)
        out[:start, start:end] = out[start:end, :start].T
    return out


def _quantize(
    products: Float[Tensor, "m n"], where: Int[Tensor, " m"], out: Int16[Tensor, "c n"]
) -> None:
    """Write products of unit vectors, in fixed point, into these rows."""
    loops = compiled_loops()
    if products.device.type == "cpu":
        loops.quantize(products.numpy(), where.numpy(), out.numpy())
    else:
        found = (products.clamp(-1, 1) * loops.GRAM_SCALE).round()
        out[where, : products.shape[1]] = found.to(torch.int16)


def error_bounds(d: int) -> tuple[float, float]:
    """Bounds on the errors of a product of unit vectors in float32, and of one in fixed point."""
    product = product_error(d)
    return product, product + 0.5 / compiled_loops().GRAM_SCALE + FLOAT32_UNIT
