"""Similarity of models: of their dictionaries, by where atoms came from, and of their activations."""

from itda_lens.compare.activations import activations_of, recorded_settings
from itda_lens.compare.comparison import (
    Comparison,
    LayerComparison,
    check_comparable,
    compare,
)
from itda_lens.compare.diff import Difference, check_diffable, diff, diff_models
from itda_lens.compare.jaccard import jaccard, usage, weighted_jaccard
from itda_lens.compare.layers import layer_matching_accuracy, similarity_matrix
from itda_lens.compare.measures import OF_LABELS, Measure, activation_similarity
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
    "OF_LABELS",
    "Comparison",
    "Difference",
    "LayerComparison",
    "Match",
    "Measure",
    "Moments",
    "RunningMoments",
    "RunningRelative",
    "activation_similarity",
    "activations_of",
    "check_comparable",
    "check_diffable",
    "compare",
    "diff",
    "diff_models",
    "jaccard",
    "layer_matching_accuracy",
    "linear_cka",
    "linear_regression_r2",
    "recorded_settings",
    "relative_representation",
    "relative_similarity",
    "similarity_matrix",
    "svcca",
    "usage",
    "weighted_jaccard",
]
