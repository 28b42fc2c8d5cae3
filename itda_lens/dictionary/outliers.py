"""Outliers, a hundred times longer than other activations, must not decide how those are coded."""

import torch
from jaxtyping import Float
from torch import Tensor

OUTLIER = 8.0
"""An activation farther from the centre than this many median distances is an outlier. It counts no more
than an activation at just that distance."""

TRIMMINGS = 5
"""How often the centre is computed again from the rows that are no outliers around it. It begins at the
median, which is nearly right."""


def limit_outliers(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Shorten centred rows that are longer than `OUTLIER` median norms to that; keep the others."""
    return x * _weights(x)[:, None]


def duplicate_cosines(x: Float[Tensor, "n d"], cosine: float) -> Float[Tensor, " n"]:
    """For each centred row, the cosine from which another direction counts as a repetition of it.

    For ordinary rows this is `cosine`. Two outliers can have a cosine of 0.99 and still differ by more
    than the length of an ordinary row, so they need a larger cosine: the part of an outlier that the
    other direction leaves unexplained must be as short as for a row of median norm at `cosine`.
    """
    norm = x.norm(dim=-1)
    share = torch.where(_weights(x) < 1, norm.median() / norm, 1)
    return (1 - (1 - cosine**2) * share**2).sqrt()


def robust_centre(x: Float[Tensor, "n d"], mean: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The centre of a stream: `mean`, or the mean of a sample `x` without outliers, if it has some."""
    centre = x.median(dim=0).values
    if (_weights(x - centre) == 1).all():
        return mean
    for _ in range(TRIMMINGS):
        centre = x[_weights(x - centre) == 1].mean(dim=0, dtype=torch.float64).to(x.dtype)
    return centre


def _weights(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Factors that shorten rows to `OUTLIER` median norms; 1 for rows that are no longer than that."""
    norm = x.norm(dim=-1)
    limit = OUTLIER * norm.median()
    if limit == 0:  # most rows are at the centre; which of the others are outliers cannot be told
        return torch.ones_like(norm)
    return (limit / norm).clamp(max=1)
