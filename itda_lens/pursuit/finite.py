"""Finding NaN and infinite numbers at the price of a sum."""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 4096
"""Rows looked at more closely at a time."""


def first_nonfinite_row(x: Float[Tensor, "n d"]) -> int | None:
    """The first row with a NaN or an infinite number; None if there is none."""
    x = x.detach()
    # One such number makes the sum of its row one too. So does overflow, hence the second look.
    for suspects in (~torch.isfinite(x.sum(dim=-1))).nonzero().flatten().split(BLOCK):
        bad = suspects[~torch.isfinite(x[suspects]).all(dim=-1)]
        if len(bad):
            return int(bad[0])
    return None
