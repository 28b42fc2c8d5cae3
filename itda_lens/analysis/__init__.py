"""Diagnostics: how good a dictionary is, where its atoms fire, and what it says of a text."""

from itda_lens.analysis._examples import (
    AtomExamples,
    CoFiring,
    Example,
    Examples,
    LogitChange,
    Neighbour,
    examples,
    examples_from,
)
from itda_lens.analysis.decompose import Component, Decomposition, TokenDecomposition, decompose
from itda_lens.analysis.evaluate import Evaluation, evaluate
from itda_lens.analysis.label_scores import LabelScore
from itda_lens.analysis.nearest import Match, TokenMatches, nearest

__all__ = [
    "AtomExamples",
    "CoFiring",
    "Component",
    "Decomposition",
    "Evaluation",
    "Example",
    "Examples",
    "LabelScore",
    "LogitChange",
    "Match",
    "Neighbour",
    "TokenDecomposition",
    "TokenMatches",
    "decompose",
    "evaluate",
    "examples",
    "examples_from",
    "nearest",
]
