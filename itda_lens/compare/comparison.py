"""Comparing models: layer by layer, and as a whole by the unions over their layers."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

from jaxtyping import Float
from torch import Tensor

from itda_lens.compare.jaccard import (
    jaccard_of_sets,
    jaccard_of_shares,
    place_set,
    place_shares,
    union,
    usage,
)
from itda_lens.compare.layers import layer_matching_accuracy, similarity_matrix
from itda_lens.compare.measures import OF_LABELS, Measure, activation_similarity
from itda_lens.compare.places import Match, Place, resolve_match
from itda_lens.records import checked
from itda_lens.sae import ITDA
from itda_lens.sources import Activations


@dataclass(frozen=True)
class LayerComparison:
    """The layers of two models.

    Attributes:
        a, b: the models' names.
        hooks_a, hooks_b: their hook points.
        similarity: [layers of a, layers of b]. For "regression", the R^2 of b's layer given a's layer.
        accuracy: `layer_matching_accuracy` from a to b. None if their numbers of layers differ, or if a
            model is compared with itself.
    """

    a: str
    b: str
    hooks_a: list[str]
    hooks_b: list[str]
    similarity: Float[Tensor, "layers_a layers_b"]
    accuracy: float | None


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        measure: the measure that was used.
        match: how labels, or tokens, were matched.
        names: the models.
        similarity: [n, n], of whole models by the unions over their layers. None for measures of
            activations, which have no unions.
        layers: every ordered pair of models.
    """

    measure: Measure
    match: Match
    names: list[str]
    similarity: Float[Tensor, "n n"] | None
    layers: list[LayerComparison]


@checked
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
        activations: needed for every measure but "jaccard": the activations of each model at the hook
            points of its dictionaries, in the same order, from the same texts (`activations_of`).

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
        unions = [union(own) for own in layers.values()]
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
        comparable = a != b and matrix.shape[0] == matrix.shape[1]
        accuracy = layer_matching_accuracy(matrix) if comparable else None
        hooks_a, hooks_b = ([_hook(itda) for itda in models[name]] for name in (a, b))
        found.append(LayerComparison(a, b, hooks_a, hooks_b, matrix, accuracy))
    return Comparison(measure, how, names, similarity, found)


@checked
def check_comparable(
    models: Mapping[str, Sequence[ITDA]], measure: Measure, match: Match = "auto"
) -> Match:
    """Check the dictionaries for `compare`, so that bad input is found before activations are read.

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


def _label_layers(
    itdas: Sequence[ITDA], activations: Sequence[Activations] | None, measure: Measure, match: Match
) -> list[dict[Place, float]]:
    """The labels of each layer, with their shares of use."""
    found = []
    for i, itda in enumerate(itdas):
        if measure == "weighted":
            assert activations is not None  # checked by compare
            found.append(place_shares(itda, usage(itda, activations[i].values), match))
        else:
            found.append(dict.fromkeys(place_set([itda], match), 1.0))
    return found


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
        shapes = [tuple(layer.values.shape) for layer in own]
        if any(len(shape) != 2 or shape[0] != len(own[0].labels) for shape in shapes):
            raise ValueError(
                f"activations of {name!r} must be [n, width] with a label each, got shapes {shapes} and "
                f"{len(own[0].labels)} labels"
            )
        if any(x.labels is not own[0].labels and x.labels != own[0].labels for x in own[1:]):
            raise ValueError(f"activations of {name!r} must be of the same tokens at every layer")
        widths = [shape[1] for shape in shapes]
        if widths != [itda.cfg.d_in for itda in itdas]:
            raise ValueError(
                f"activations of {name!r} have widths {widths}, but its dictionaries "
                f"{[itda.cfg.d_in for itda in itdas]}"
            )
