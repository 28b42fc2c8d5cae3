"""How well a dictionary reconstructs activations, slice by slice."""

import torch
from torch import Tensor

from itda_lens import ITDA
from itda_lens.dictionary import RunningFVU

ROWS = 1024
"""Activations encoded at once."""


@torch.no_grad()
def fvu_and_l0(itda: ITDA, x: Tensor) -> tuple[float, float]:
    """FVU and mean L0 of a dictionary on activations of any number."""
    meter, nonzeros = RunningFVU(), 0
    for rows in x.split(ROWS):
        codes = itda.encode_sparse(rows)
        meter.update(rows, itda.decode_sparse(codes))
        nonzeros += int(codes.l0().sum())
    return meter.value(), nonzeros / len(x)
