"""The evaluations of SAEBench and SAELens, run on dictionaries.

The names of `architectures` can be imported from here too, since they once stood here.
"""

from itda_lens.architectures import (
    Baseline,
    baseline,
    build_baselines,
    principal_components,
    random_atoms,
    save_inference,
    train_sae,
)
from itda_lens.saebench.evaluations import EVALUATIONS, Evaluation, Metric
from itda_lens.saebench.results import Result
from itda_lens.saebench.runner import CodesOption, bench

__all__ = [
    "EVALUATIONS",
    "Baseline",
    "CodesOption",
    "Evaluation",
    "Metric",
    "Result",
    "baseline",
    "bench",
    "build_baselines",
    "principal_components",
    "random_atoms",
    "save_inference",
    "train_sae",
]
