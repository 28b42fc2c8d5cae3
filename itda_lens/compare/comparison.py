"""Models side by side: layer by layer, and whole models by the unions over their layers."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.compare.jaccard import (
    jaccard_of_sets,
    jaccard_of_shares,
    place_set,
    place_shares,
    usage,
)
from itda_lens.compare.layers import layer_matching_accuracy, similarity_matrix
from itda_lens.compare.moments import Moments, RunningMoments
from itda_lens.compare.places import Match, Place, places, resolve_match
from itda_lens.compare.representations import (
    DEFAULT_ANCHORS,
    RunningRelative,
    draw_anchors,
    linear_cka,
    linear_regression_r2,
    svcca,
)
from itda_lens.dictionary import Label
from itda_lens.sae import ITDA
from itda_lens.training import Activations

Measure = Literal["jaccard", "weighted", "cka", "svcca", "regression", "relative", "relative-centred"]
"""`jaccard`, `weighted_jaccard` by `usage`; `linear_cka`, `svcca`, `linear_regression_r2`,
`relative_similarity`, with and without `centred`."""

OF_LABELS: tuple[Measure, ...] = ("jaccard", "weighted")
"""Measures of labels; the others look at activations only."""

_OF_MOMENTS: dict[Measure, Callable[[Moments], float]] = {
    "cka": linear_cka,
    "svcca": svcca,
    "regression": linear_regression_r2,
}

ROWS = 8192
"""Activations in float64 at once."""


@dataclass(frozen=True)
class LayerComparison:
    """The layers of two models.

    Attributes:
        a, b: the models' names.
        hooks_a, hooks_b: their hook points.
        similarity: [layers of a, layers of b]; of "regression" the R^2 of b's layer given a's.
        accuracy: `layer_matching_accuracy` from a to b; None if their numbers of layers differ.
    """

    a: str
    b: str
    hooks_a: list[str]
    hooks_b: list[str]
    similarity: Float[Tensor, "layers_a layers_b"]
    accuracy: float | None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        measure: what was measured.
        match: how labels, or tokens, were matched.
        names: the models.
        similarity: [n, n] of whole models, by the unions over their layers; None for measures that know
            no union.
        layers: every ordered pair of models.
    """

    measure: Measure
    match: Match
    names: list[str]
    similarity: Float[Tensor, "n n"] | None
    layers: list[LayerComparison]


def compare(
    models: Mapping[str, Sequence[ITDA]],
    measure: Measure = "jaccard",
    match: Match = "auto",
    activations: Mapping[str, Sequence[Activations]] | None = None,
) -> Comparison:
    """Compare models by the dictionaries of their layers, or by their activations there.

    Args:
        models: dictionaries of each model, in the order of its layers, by the name to show.
        measure: see `Measure`.
        match: when two labels, or tokens of two tokenizers, are the same; see `Match`. The measures of
            activations look at tokens that both models have.
        activations: for every measure but "jaccard": of each model, at the hook points of its
            dictionaries in the same order, from the same texts (`activations_of`).

    Raises:
        ValueError: fewer than two dictionaries, a model without any, unlabelled ones, different texts,
            activations that are missing or do not belong to the dictionaries, no token in common, or an
            unknown measure.
    """
    how = check_comparable(models, measure, match)
    if measure != "jaccard":
        _check_activations(models, activations, measure)
    names, similarity = list(models), None
    # With one model only, its layers are compared with themselves.
    pairs = list(itertools.permutations(names, 2)) or [(names[0], names[0])]
    if measure in OF_LABELS:
        layers = {
            name: _label_layers(own, (activations or {}).get(name), measure, how)
            for name, own in models.items()
        }
        unions = [_union(own) for own in layers.values()]
        alike = partial(_alike, measure=measure, match=how)
        similarity = similarity_matrix(unions, unions, alike)
        matrices = {pair: similarity_matrix(layers[pair[0]], layers[pair[1]], alike) for pair in pairs}
    else:
        assert activations is not None  # checked above
        matrices = {}
        for a, b in pairs:
            if (b, a) in matrices and measure != "regression":
                matrices[a, b] = matrices[b, a].T
            else:
                matrices[a, b] = activation_similarity(activations[a], activations[b], measure, how)
    found = []
    for (a, b), matrix in matrices.items():
        accuracy = layer_matching_accuracy(matrix) if matrix.shape[0] == matrix.shape[1] else None
        hooks_a, hooks_b = ([_hook(itda) for itda in models[name]] for name in (a, b))
        found.append(LayerComparison(a, b, hooks_a, hooks_b, matrix, accuracy))
    return Comparison(measure, how, names, similarity, found)


def check_comparable(
    models: Mapping[str, Sequence[ITDA]], measure: Measure, match: Match = "auto"
) -> Match:
    """What `compare` needs, but for activations: to be told of bad input before these are read.

    Returns:
        How labels will be matched.

    Raises:
        ValueError: as `compare`.
    """
    if measure not in get_args(Measure):
        raise ValueError(f"measure must be one of {get_args(Measure)}, got {measure!r}")
    empty = [name for name, layers in models.items() if not layers]
    if empty:
        raise ValueError(f"models must have one dictionary or more each, but {empty[0]!r} has none")
    if sum(map(len, models.values())) < 2:
        raise ValueError("models must hold two dictionaries or more to compare, got fewer")
    how = resolve_match([itda for layers in models.values() for itda in layers], match)
    if measure != "jaccard" and how == "overlap":
        raise ValueError(f"match='overlap' cannot be used with measure={measure!r}; use 'span'")
    return how


def activation_similarity(
    a: Sequence[Activations], b: Sequence[Activations], measure: Measure, match: Match
) -> Float[Tensor, "layers_a layers_b"]:
    """A measure of activations, of every layer of one model with every layer of another.

    Args:
        a, b: activations at each layer, of the same texts; the labels of all layers of a side are equal.
        measure: one that is not `OF_LABELS`.
        match: "position" or "span".

    Raises:
        ValueError: no token is in both.
    """
    xs, ys, _ = shared_tokens(a, b, match)
    if measure in _OF_MOMENTS:
        running = RunningMoments()
    else:
        drawn = draw_anchors(len(xs[0]), DEFAULT_ANCHORS, seed=0)
        anchors = ([layer[drawn] for layer in side] for side in (xs, ys))
        running = RunningRelative(*anchors, centred=measure == "relative-centred")
    for start in range(0, len(xs[0]), ROWS):
        part = slice(start, start + ROWS)
        running.update([layer[part] for layer in xs], [layer[part] for layer in ys])
    if isinstance(running, RunningRelative):
        return running.values()
    measured, pair = _OF_MOMENTS[measure], running.pair
    return similarity_matrix(range(len(xs)), range(len(ys)), lambda i, j: measured(pair(i, j)))


def shared_tokens(
    a: Sequence[Activations], b: Sequence[Activations], match: Match
) -> tuple[list[Tensor], list[Tensor], Sequence[Label]]:
    """Activations, layer by layer, of the tokens that both sides have, in one order; labels of `b`.

    Raises:
        ValueError: there are none.
    """
    own, other = (places(side[0].labels, match) for side in (a, b))
    if own == other:
        return [layer.values for layer in a], [layer.values for layer in b], b[0].labels
    there = {place: row for row, place in enumerate(other) if place is not None}
    rows = [(i, there[place]) for i, place in enumerate(own) if place in there]
    if not rows:
        raise ValueError(
            "activations must have tokens in common, but no token of one model is one of the other"
        )
    left, right = torch.tensor(rows).T
    xs, ys = [layer.values[left] for layer in a], [layer.values[right] for layer in b]
    return xs, ys, [b[0].labels[j] for _, j in rows]


def _label_layers(
    itdas: Sequence[ITDA], activations: Sequence[Activations] | None, measure: Measure, match: Match
) -> list[dict[Place, float]]:
    """The labels of each layer, with their shares of use."""
    found = []
    for i, itda in enumerate(itdas):
        if measure == "weighted":
            assert activations is not None  # checked by compare
            found.append(place_shares([itda], [usage(itda, activations[i].values)], match))
        else:
            found.append(dict.fromkeys(place_set([itda], match), 1.0))
    return found


def _union(layers: Sequence[dict[Place, float]]) -> dict[Place, float]:
    total: dict[Place, float] = {}
    for layer in layers:
        for place, share in layer.items():
            total[place] = total.get(place, 0.0) + share / len(layers)
    return total


def _alike(u: dict[Place, float], v: dict[Place, float], measure: Measure, match: Match) -> float:
    return jaccard_of_shares(u, v) if measure == "weighted" else jaccard_of_sets(set(u), set(v), match)


def _hook(itda: ITDA) -> str:
    return itda.cfg.metadata.hook_name or "?"


def _check_activations(
    models: Mapping[str, Sequence[ITDA]],
    activations: Mapping[str, Sequence[Activations]] | None,
    measure: Measure,
) -> None:
    for name, itdas in models.items():
        own = (activations or {}).get(name)
        if own is None or len(own) != len(itdas):
            raise ValueError(
                f"measure={measure!r} needs activations at each hook point of {name!r}: expected "
                f"{len(itdas)}, got {0 if own is None else len(own)}"
            )
        widths = [layer.values.shape[1] for layer in own]
        if widths != [itda.cfg.d_in for itda in itdas]:
            raise ValueError(
                f"activations of {name!r} have widths {widths}, but its dictionaries "
                f"{[itda.cfg.d_in for itda in itdas]}"
            )
