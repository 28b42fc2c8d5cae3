"""Fraction of variance unexplained, over a stream."""

import torch
from jaxtyping import Float
from torch import Tensor


class RunningFVU:
    """FVU = sum |x - xhat|^2 / sum |x - mean x|^2 over all rows seen, in float64."""

    def __init__(self) -> None:
        self.n = 0
        self._error = 0.0
        self._square = 0.0
        self._sum: Tensor | float = 0.0

    def update(self, x: Float[Tensor, "m d"], reconstruction: Float[Tensor, "m d"]) -> None:
        x = x.double()
        self.n += len(x)
        self._error += (x - reconstruction.double()).square().sum().item()
        self._square += x.square().sum().item()
        self._sum = self._sum + x.sum(dim=0)

    def value(self) -> float:
        """The FVU so far; NaN before any variance was seen."""
        if self.n == 0:
            return float("nan")
        total = self._square - float(torch.as_tensor(self._sum).square().sum()) / self.n
        return self._error / total if total > 0 else float("nan")
