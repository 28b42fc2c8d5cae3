"""How atoms are chosen, labelled and stored, on plain tensors."""

from itda_lens.dictionary.energy import EnergySelector
from itda_lens.dictionary.greedy import DEFAULT_LOSS_THRESHOLD, GreedySelector
from itda_lens.dictionary.labels import Label, Labels, RowLabels, as_label
from itda_lens.dictionary.selection import Dictionary, Selector, energy_by_atom
from itda_lens.dictionary.update import DEFAULT_LEAST_COSINE
from itda_lens.dictionary.variance import RunningFVU

__all__ = [
    "DEFAULT_LEAST_COSINE",
    "DEFAULT_LOSS_THRESHOLD",
    "Dictionary",
    "EnergySelector",
    "GreedySelector",
    "Label",
    "Labels",
    "RowLabels",
    "RunningFVU",
    "Selector",
    "as_label",
    "energy_by_atom",
]
