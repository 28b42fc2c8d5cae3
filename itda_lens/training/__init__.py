"""From activations, or a model and texts, to dictionaries."""

from itda_lens.training.build import build
from itda_lens.training.fit import fit
from itda_lens.training.output import output_folder, save_all
from itda_lens.training.presets import Preset, Recipe
from itda_lens.training.record import BUILD_KEY
from itda_lens.training.stream import Activations, collect

__all__ = [
    "BUILD_KEY",
    "Activations",
    "Preset",
    "Recipe",
    "build",
    "collect",
    "fit",
    "output_folder",
    "save_all",
]
