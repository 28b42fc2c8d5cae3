"""How well a dictionary reconstructs activations, slice by slice."""

from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from itda_lens.dictionary import RunningFVU
from itda_lens.sae import coded

ROWS = 1024
"""Activations encoded at once."""


@torch.no_grad()
def fvu_and_l0(sae: SAE[Any], x: Tensor) -> tuple[float, float]:
    """FVU and mean L0 of a dictionary or SAE on any number of activations."""
    meter, nonzeros = RunningFVU(), 0
    for part in coded(sae, x, ROWS):
        meter.update(part.x, part.reconstruction)
        nonzeros += int(part.codes.l0().sum())
    return meter.value(), nonzeros / len(x)
