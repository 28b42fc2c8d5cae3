"""Finding NaN and infinite numbers at the price of a sum."""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 4096
"""Rows that are searched at a time, once a sum has shown that a number is not finite."""

LARGEST = {torch.float64: 1e150, torch.float32: 1e34, torch.bfloat16: 1e34}
"""Larger numbers are refused. The squared norm of a row must be finite in float64, and coefficients,
which can be some hundred times as large as it, must be in the dtype of codes. All of float16 may be
coded."""


def first_nonfinite_row(x: Float[Tensor, "n d"]) -> int | None:
    """The first row with a NaN or an infinite number; None if there is none."""
    x = x.detach()
    # One such number makes its row's sum NaN or infinite. So does overflow, hence the second look.
    for suspects in (~torch.isfinite(x.sum(dim=-1))).nonzero().flatten().split(BLOCK):
        bad = suspects[~torch.isfinite(x[suspects]).all(dim=-1)]
        if len(bad):
            return int(bad[0])
    return None


def check_rows(name: str, x: Float[Tensor, "n d"]) -> None:
    """Refuse rows that a pursuit cannot compute with.

    Raises:
        ValueError: a number is NaN, infinite, or larger than `LARGEST`; the message names the row.
    """
    bad = first_nonfinite_row(x)
    if bad is not None:
        raise ValueError(f"{name} has NaN or infinite values, first in row {bad}")
    allowed = LARGEST.get(x.dtype, torch.inf)
    if x.numel() and (largest := x.detach().abs().max()) > allowed:
        raise ValueError(f"{name} must be at most {allowed:.0e} in size, got {largest:.3g}")
