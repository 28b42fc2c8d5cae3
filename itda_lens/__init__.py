"""Labelled sparse dictionaries of real model activations, each one a SAELens SAE.

Importing this package registers the architecture "itda" with SAELens.
"""

from itda_lens.compare import jaccard
from itda_lens.pursuit import SparseCodes
from itda_lens.records import Label, Labels
from itda_lens.sae import ITDA, ITDAConfig, load, register
from itda_lens.training import build, fit

__all__ = [
    "ITDA",
    "ITDAConfig",
    "Label",
    "Labels",
    "SparseCodes",
    "build",
    "fit",
    "jaccard",
    "load",
]

register()
