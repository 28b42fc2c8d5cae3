"""Diagnostics: how good a dictionary is, and what it says of a text."""

from itda_lens.analysis.decompose import Component, TokenDecomposition, decompose
from itda_lens.analysis.evaluate import Evaluation, evaluate

__all__ = ["Component", "Evaluation", "TokenDecomposition", "decompose", "evaluate"]
