"""How atoms are chosen and moved, on plain tensors."""

from itda_lens.dictionary.energy import EnergyRule
from itda_lens.dictionary.extension import more_atoms
from itda_lens.dictionary.folds import assign_folds
from itda_lens.dictionary.greedy import DEFAULT_LOSS_THRESHOLD, GreedyRule
from itda_lens.dictionary.rule import (
    Dictionary,
    Foreseeing,
    Guided,
    Request,
    Resumable,
    Rule,
    Sated,
    Selector,
)
from itda_lens.dictionary.rules import RULES
from itda_lens.dictionary.sampling import PriorityBound, StreamSample
from itda_lens.dictionary.selection import SAME_DIRECTION, energy_by_atom, first_of_direction
from itda_lens.dictionary.update import DEFAULT_LEAST_COSINE
from itda_lens.dictionary.variance import RunningFVU

__all__ = [
    "DEFAULT_LEAST_COSINE",
    "DEFAULT_LOSS_THRESHOLD",
    "RULES",
    "SAME_DIRECTION",
    "Dictionary",
    "EnergyRule",
    "Foreseeing",
    "GreedyRule",
    "Guided",
    "PriorityBound",
    "Request",
    "Resumable",
    "Rule",
    "RunningFVU",
    "Sated",
    "Selector",
    "StreamSample",
    "assign_folds",
    "energy_by_atom",
    "first_of_direction",
    "more_atoms",
]
