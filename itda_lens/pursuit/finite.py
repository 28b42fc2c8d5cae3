"""Finding NaN and infinite numbers at the price of a sum."""

import torch
from jaxtyping import Float
from torch import Tensor


def first_nonfinite_row(x: Float[Tensor, "n d"]) -> int | None:
    """The first row with a NaN or an infinite number; None if there is none."""
    x = x.detach()
    # One such number makes the sum of its row one too. So does overflow, hence the second look.
    suspects = (~torch.isfinite(x.sum(dim=-1))).nonzero().flatten()
    bad = suspects[~torch.isfinite(x[suspects]).all(dim=-1)]
    return int(bad[0]) if len(bad) else None
