"""Diagnostics: how good a dictionary is, and what it says of a text."""

from itda_lens.analysis.decompose import Component, TokenDecomposition, decompose
from itda_lens.analysis.evaluate import Evaluation, evaluate
from itda_lens.analysis.rows import RowsEvaluation, evaluate_rows

__all__ = [
    "Component",
    "Evaluation",
    "RowsEvaluation",
    "TokenDecomposition",
    "decompose",
    "evaluate",
    "evaluate_rows",
]
