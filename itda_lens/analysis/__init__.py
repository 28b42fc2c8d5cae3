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
from itda_lens.analysis.rows import RowsEvaluation, evaluate_rows

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
    "RowsEvaluation",
    "TokenDecomposition",
    "TokenMatches",
    "decompose",
    "evaluate",
    "evaluate_rows",
    "examples",
    "examples_from",
    "nearest",
]
