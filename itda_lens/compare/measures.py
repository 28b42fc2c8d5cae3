"""The measures by name, and those of activations for every layer of two models."""

import logging
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from itda_lens.compare.layers import similarity_matrix
from itda_lens.compare.moments import Moments, check_layers, products
from itda_lens.compare.places import Match, places
from itda_lens.compare.representations import (
    DEFAULT_ANCHORS,
    RunningRelative,
    draw_anchors,
    linear_cka,
    linear_regression_r2,
    svcca,
)
from itda_lens.records import Label, checked
from itda_lens.sources import Activations

logger = logging.getLogger(__name__)

Measure = Literal["jaccard", "weighted", "cka", "svcca", "regression", "relative", "relative-centred"]
"""Names of measures. In this order they are: `jaccard`, `weighted_jaccard` by `usage`, `linear_cka`,
`svcca`, `linear_regression_r2`, and `relative_similarity` without and with `centred`."""

OF_LABELS: tuple[Measure, ...] = ("jaccard", "weighted")
"""Measures of labels; the others look at activations only."""

_OF_MOMENTS: dict[Measure, Callable[[Moments], float]] = {
    "cka": linear_cka,
    "svcca": svcca,
    "regression": linear_regression_r2,
}

ENOUGH = 4
"""A regression or CCA on fewer tokens than this multiple of the width fits noise."""

ROWS = 1024
"""Activations of every layer that are in float64 at once, for relative representations."""


@checked
def activation_similarity(
    a: Sequence[Activations], b: Sequence[Activations], measure: Measure, match: Match
) -> Float[Tensor, "layers_a layers_b"]:
    """Compare activations at every layer of one model with those at every layer of another.

    Beside the activations, memory holds the covariances of all layers, and that of one pair of layers.

    Args:
        a, b: activations at each layer, of the same texts; all layers of a side of the same tokens.
        measure: a measure that is not in `OF_LABELS`.
        match: "position" or "span": which tokens are the same.

    Raises:
        ValueError: an unknown measure or match, no token in both, or NaN or infinite values.
    """
    known = [name for name in get_args(Measure) if name not in OF_LABELS]
    if measure not in known:
        raise ValueError(f"measure must be one of {known}, got {measure!r}")
    if match not in ("position", "span"):
        raise ValueError(f"match must be 'position' or 'span', got {match!r}")
    xs, ys, _ = shared_tokens(a, b, match)
    check_layers(xs, ys, "activations")
    n, width = len(xs[0]), max(layer.shape[1] for layer in (*xs, *ys))
    if measure in ("svcca", "regression") and n < ENOUGH * width:
        logger.warning("%d tokens are few for %s at width %d: it fits noise", n, measure, width)
    if measure in _OF_MOMENTS:
        of_moments = _OF_MOMENTS[measure]
        own_x, own_y = ([products(layer, layer) for layer in side] for side in (xs, ys))

        def measured(i: int, j: int) -> float:
            return of_moments(Moments(n, own_x[i], own_y[j], products(xs[i], ys[j])))

        return similarity_matrix(range(len(xs)), range(len(ys)), measured)
    drawn = draw_anchors(n, DEFAULT_ANCHORS, seed=0)
    anchors = ([layer[drawn.to(layer.device)] for layer in side] for side in (xs, ys))
    running = RunningRelative(*anchors, centred=measure == "relative-centred")
    for start in range(0, n, ROWS):
        part = slice(start, start + ROWS)
        running.update([layer[part] for layer in xs], [layer[part] for layer in ys])
    return running.values()


def shared_tokens(
    a: Sequence[Activations], b: Sequence[Activations], match: Match
) -> tuple[list[Tensor], list[Tensor], Sequence[Label]]:
    """Activations, layer by layer, of the tokens that both sides have, in one order; labels of `b`.

    When tokens are matched by characters, special tokens are left out, and only the first of several
    tokens of one character is kept.

    Raises:
        ValueError: the sides share no token.
    """
    own, other = (_first_rows(side[0].labels, match) for side in (a, b))
    common = own.keys() & other.keys()
    if not common:
        raise ValueError(
            "activations must have tokens in common, but no token of one model is one of the other"
        )
    left = [row for place, row in own.items() if place in common]
    right = [other[place] for place in own if place in common]
    xs, ys = _taken(a, left), _taken(b, right)
    return xs, ys, [b[0].labels[row] for row in right]


def _taken(side: Sequence[Activations], rows: list[int]) -> list[Tensor]:
    """Some rows of every layer; not copied if they are all rows, in order."""
    if rows == list(range(len(side[0].labels))):
        return [layer.values for layer in side]
    return [layer.values[rows] for layer in side]


def _first_rows(labels: Sequence[Label], match: Match) -> dict[tuple[int, ...], int]:
    """The row of each place: the first one, if several rows have one place."""
    rows: dict[tuple[int, ...], int] = {}
    for row, place in enumerate(places(labels, match)):
        if place is not None:
            rows.setdefault(place, row)
    return rows
