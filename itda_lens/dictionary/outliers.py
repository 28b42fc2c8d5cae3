"""Activations a hundred times the usual size: they must not decide how all others are coded."""

import torch
from jaxtyping import Float
from torch import Tensor

OUTLIER = 8.0
"""Distance from the centre, in medians of it, from which an activation counts no more than at it."""

TRIMMINGS = 5
"""Means of the rows that are near the last one; the median that they begin at is nearly right."""


def limit_outliers(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Centred rows, those longer than `OUTLIER` median norms cut to that; the others as they are."""
    return x * _weights(x)[:, None]


def duplicate_cosines(x: Float[Tensor, "n d"], cosine: float) -> Float[Tensor, " n"]:
    """The cosine to another direction from which each centred row counts as a repetition of it.

    `cosine`, but for outliers: these are repeated by what leaves no more of them than a direction at
    `cosine` leaves of a row of median norm.
    """
    norm = x.norm(dim=-1)
    share = torch.where(_weights(x) < 1, norm.median() / norm, 1)
    return (1 - (1 - cosine**2) * share**2).sqrt()


def robust_centre(x: Float[Tensor, "n d"], mean: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """`mean`, unless outliers may have moved it: then the mean of a sample `x` without them."""
    centre = x.median(dim=0).values
    if (_weights(x - centre) == 1).all():
        return mean
    for _ in range(TRIMMINGS):
        centre = x[_weights(x - centre) == 1].mean(dim=0, dtype=torch.float64).to(x.dtype)
    return centre


def _weights(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """1 for rows of up to `OUTLIER` median norms, less for longer ones."""
    norm = x.norm(dim=-1)
    limit = OUTLIER * norm.median()
    if limit == 0:  # most rows are at the centre; which of the others are outliers cannot be told
        return torch.ones_like(norm)
    return (limit / norm).clamp(max=1)
