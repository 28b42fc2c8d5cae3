"""Activations of any size, coded at sizes at which neither they nor their squares overflow or vanish."""

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

SPAN = 64
"""Rows are scaled by powers of two with exponents that are multiples of this: most by 1. Afterwards the
largest number of a row lies within 2**-33 and 2**32, and its squares are far from the limits of
float32."""

BEYOND = 2.0**100
"""A threshold that no scaled row reaches. Larger ones become this one, so that they can be squared."""

Number = TypeVar("Number", float, Tensor)

Search = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""(rows, threshold) -> (picks, coefficients)."""


def at_ordinary_size(
    search: Search, x: Float[Tensor, "b d"], threshold: float
) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"]]:
    """`search(x, threshold)`, with rows that are very large or small scaled first, and their
    coefficients scaled back.

    Powers of two change no bit of a result, unless a coefficient is so small that its dtype has no more
    digits for it. Rows of ordinary size are not changed.
    """
    exponents = torch.frexp(x.abs().amax(dim=-1)).exponent
    groups = (exponents / SPAN).round().long() * SPAN
    sizes = groups.unique().tolist()
    parts = []
    for size in sizes:
        rows = x if len(sizes) == 1 else x[groups == size]
        picks, coefficients = search(_times(rows, -size), min(_times(threshold, -size), BEYOND))
        parts.append((picks, _times(coefficients, size)))
    if len(parts) == 1:
        return parts[0]
    order = torch.cat([(groups == size).nonzero().flatten() for size in sizes]).argsort()
    picks, coefficients = (torch.cat(column)[order] for column in zip(*parts, strict=True))
    return picks, coefficients


def _times(x: Number, exponent: int) -> Number:
    """`x * 2**exponent`; in two steps, since the factor itself may be too large or small for the
    dtype."""
    return x * 2.0 ** (exponent // 2) * 2.0 ** (exponent // 2) if exponent else x
