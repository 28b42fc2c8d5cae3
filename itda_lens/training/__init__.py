"""From activations, or a model and texts, to dictionaries."""

from itda_lens.sources import Activations
from itda_lens.training.build import build, collect
from itda_lens.training.fit import fit
from itda_lens.training.output import output_folder, save_all
from itda_lens.training.recipe import Preset, Recipe, recipe_of
from itda_lens.training.run import build_from, check_enough
from itda_lens.training.shards import Plan, open_plan, plan, plan_from

__all__ = [
    "Activations",
    "Plan",
    "Preset",
    "Recipe",
    "build",
    "build_from",
    "check_enough",
    "collect",
    "fit",
    "open_plan",
    "output_folder",
    "plan",
    "plan_from",
    "recipe_of",
    "save_all",
]
