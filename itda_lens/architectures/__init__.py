"""Other ways to a dictionary or SAE: what an ITDA has to beat.

Activations drawn at random, principal components, and SAEs that SAELens trains on the same activations.
"""

from itda_lens.architectures.inference import save_inference
from itda_lens.architectures.kinds import Baseline, baseline
from itda_lens.architectures.pca import principal_components
from itda_lens.architectures.random_draw import random_atoms
from itda_lens.architectures.rivals import build_baselines
from itda_lens.architectures.trained import Architecture, train_sae

__all__ = [
    "Architecture",
    "Baseline",
    "baseline",
    "build_baselines",
    "principal_components",
    "random_atoms",
    "save_inference",
    "train_sae",
]
