"""From activations, or a model and texts, to dictionaries."""

from itda_lens.training.build import build
from itda_lens.training.fit import fit
from itda_lens.training.output import output_folder, save_all
from itda_lens.training.presets import Preset, Recipe
from itda_lens.training.record import BUILD_KEY, build_record, hook_name_of
from itda_lens.training.stream import Activations, collect

__all__ = [
    "BUILD_KEY",
    "Activations",
    "Preset",
    "Recipe",
    "build",
    "build_record",
    "collect",
    "fit",
    "hook_name_of",
    "output_folder",
    "save_all",
]
