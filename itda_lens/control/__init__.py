"""Editing a running model by the atoms of a dictionary, and measuring what an edit does."""

from itda_lens.control.edit import Edit, direction
from itda_lens.control.gates import GATES, Always, Excess, FiresAbove, Masked, Positions, Tokens
from itda_lens.control.measuring import (
    Effect,
    Interval,
    Prompt,
    effects,
    gate_scores,
    opening_at,
)
from itda_lens.control.operations import OPERATIONS, Add, Clamp, ProjectOut, Scale, Swap
from itda_lens.control.running import Tally, applied
from itda_lens.control.saved import load_edits, save_edits
from itda_lens.control.seen import Gate, Operation, Reading, Rows
from itda_lens.control.selection import (
    Scored,
    contrast,
    labelled,
    output_scores,
    swapped,
    typical_coefficients,
)
from itda_lens.control.systems import (
    exemplar_ablation,
    interpret_then_deactivate,
    pole,
    tiered,
    unlearn,
)
from itda_lens.control.writing import written

__all__ = [
    "GATES",
    "OPERATIONS",
    "Add",
    "Always",
    "Clamp",
    "Edit",
    "Effect",
    "Excess",
    "FiresAbove",
    "Gate",
    "Interval",
    "Masked",
    "Operation",
    "Positions",
    "ProjectOut",
    "Prompt",
    "Reading",
    "Rows",
    "Scale",
    "Scored",
    "Swap",
    "Tally",
    "Tokens",
    "applied",
    "contrast",
    "direction",
    "effects",
    "exemplar_ablation",
    "gate_scores",
    "interpret_then_deactivate",
    "labelled",
    "load_edits",
    "opening_at",
    "output_scores",
    "pole",
    "save_edits",
    "swapped",
    "tiered",
    "typical_coefficients",
    "unlearn",
    "written",
]
