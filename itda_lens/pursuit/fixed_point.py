"""Inner products in 16-bit fixed point."""

import threading
from typing import Any

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from itda_lens.pursuit.precision import FLOAT32_UNIT, float32_products, product_error

PRODUCT_ROWS = 256
"""Rows that exist in float32 at a time."""

_compiling = threading.Lock()
"""Held while the kernels are imported: numba's decorators are not meant to race."""


def kernels() -> Any:
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
        out: written to, and returned; by default a new matrix of as many rows as `a`.
        where: the row of `out` for each row of `a`; in order by default.
    """
    if out is None:
        out = torch.empty(len(a), len(b), dtype=torch.int16, device=a.device)
    if where is None:
        where = torch.arange(len(a), device=a.device)
    a, b = a.detach(), b.detach().float()
    loops = kernels()
    for rows, targets in zip(a.split(PRODUCT_ROWS), where.split(PRODUCT_ROWS), strict=True):
        products = float32_products(rows, b)
        if a.is_cuda:
            out[targets] = (products.clamp(-1, 1) * loops.GRAM_SCALE).round().to(torch.int16)
        else:
            loops.quantize(products.numpy(), targets.numpy(), out.numpy())
    return out


def error_bounds(d: int) -> tuple[float, float]:
    """Bounds on the errors of a product of unit vectors in float32, and of one in fixed point."""
    product = product_error(d)
    return product, product + 0.5 / kernels().GRAM_SCALE + FLOAT32_UNIT
