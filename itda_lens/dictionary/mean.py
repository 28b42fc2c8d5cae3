"""The mean of a stream, the same to the last bit whatever its batches."""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 64
"""Rows summed at once: those from one multiple of it in the stream to the next, whatever the batches."""


class RunningMean:
    """Mean of the rows shown so far, summed in float64."""

    def __init__(self, d: int, dtype: torch.dtype, device: torch.device) -> None:
        self._sum = torch.zeros(d, dtype=torch.float64, device=device)
        self._pending = torch.empty(0, d, dtype=dtype, device=device)
        self.n = 0

    def update(self, x: Float[Tensor, "m d"]) -> None:
        self.n += len(x)
        rows = torch.cat([self._pending, x])
        *blocks, last = rows.split(BLOCK)
        if len(last) == BLOCK:
            blocks, last = [*blocks, last], last[:0]
        for block in blocks:
            self._sum += block.sum(dim=0, dtype=torch.float64)
        self._pending = last.clone()

    def value(self) -> Float[Tensor, " d"]:
        """In the dtype of the rows; zero before the first."""
        total = self._sum + self._pending.sum(dim=0, dtype=torch.float64)
        return (total / max(1, self.n)).to(self._pending.dtype)
