"""Similarity of models: of their dictionaries, by where atoms came from, and of their activations."""

from itda_lens.compare.jaccard import jaccard, usage, weighted_jaccard
from itda_lens.compare.layers import layer_matching_accuracy, similarity_matrix
from itda_lens.compare.moments import Moments, RunningMoments
from itda_lens.compare.places import Match
from itda_lens.compare.representations import (
    RunningRelative,
    linear_cka,
    linear_regression_r2,
    relative_representation,
    relative_similarity,
    svcca,
)

__all__ = [
    "Match",
    "Moments",
    "RunningMoments",
    "RunningRelative",
    "jaccard",
    "layer_matching_accuracy",
    "linear_cka",
    "linear_regression_r2",
    "relative_representation",
    "relative_similarity",
    "similarity_matrix",
    "svcca",
    "usage",
    "weighted_jaccard",
]
