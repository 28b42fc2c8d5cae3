"""The values that options may have.

The library has these as types of its own. They are written again here, since importing them there would
import torch before `--help` is shown; tests/test_cli.py holds the two equal.
"""

from typing import Literal

Preset = Literal["best", "thorough", "paper"]
Method = Literal["mp", "omp", "ols"]
Loader = Literal["bridge", "hooked_transformer", "huggingface"]
Measure = Literal["jaccard", "weighted", "cka", "svcca", "regression", "relative", "relative-centred"]
Match = Literal["auto", "position", "span", "overlap"]
Contrast = Literal["difference", "sets", "f1", "strongest"]
AmountUnit = Literal["norm", "absolute"]
Codes = Literal["both", "signed", "nonnegative"]
Exposed = Literal["full", "places", "none"]
SpecialTokens = Literal["keep", "cap", "exclude"]
Evaluation = Literal[
    "saelens",
    "core",
    "sparse_probing",
    "sparse_probing_sae_probes",
    "absorption",
    "scr",
    "tpp",
    "meta_structure",
    "autointerp",
    "ravel",
    "unlearning",
    "mdl",
]
Baseline = Literal["random", "pca", "topk", "batchtopk", "matryoshka", "matching_pursuit"]
