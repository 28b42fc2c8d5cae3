"""Inner products in 16-bit fixed point."""

import threading
from typing import Any

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

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

    Rounding moves each by at most 1.6e-5 from its float32 product, which is at full precision whatever
    the user allows elsewhere (autocast; `torch.set_float32_matmul_precision`).

    Args:
        out: written to, and returned; by default a new matrix of as many rows as `a`.
        where: the row of `out` for each row of `a`; in order by default.
    """
    if out is None:
        out = torch.empty(len(a), len(b), dtype=torch.int16)
    if where is None:
        where = torch.arange(len(a))
    a, b = a.detach().float(), b.detach().float()
    quantize = kernels().quantize
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.autocast("cpu", enabled=False):
            for rows, targets in zip(a.split(PRODUCT_ROWS), where.split(PRODUCT_ROWS), strict=True):
                quantize((rows @ b.T).numpy(), targets.numpy(), out.numpy())
    finally:
        torch.set_float32_matmul_precision(precision)
    return out
