"""Rows of numbers in a buffer that grows by doubling."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class RowStore:
    """Append-only rows; a row may be overwritten in place.

    The buffer doubles when it is full, so `n` appended rows cost O(n) copies, and stops doubling at
    `limit`, so that it never holds more than that.
    """

    def __init__(self, d: int, dtype: torch.dtype, device: torch.device, limit: int) -> None:
        self._buffer = torch.empty(0, d, dtype=dtype, device=device)
        self._limit, self._n = limit, 0

    def __len__(self) -> int:
        return self._n

    @property
    def rows(self) -> Float[Tensor, "n d"]:
        """A view of the rows; valid until the next `append`."""
        return self._buffer[: len(self)]

    @property
    def room(self) -> int:
        """How many more rows fit under the limit."""
        return self._limit - len(self)

    def append(self, rows: Float[Tensor, "m d"]) -> None:
        """Add `rows` at the end."""
        n, needed = len(self), len(self) + len(rows)
        if needed > self._limit:
            raise ValueError(f"{needed} rows exceed the limit of {self._limit}")
        if needed > len(self._buffer):
            size = min(self._limit, max(needed, 2 * len(self._buffer), 256))
            grown = self._buffer.new_empty(size, self._buffer.shape[1])
            grown[:n] = self.rows
            self._buffer = grown
        self._buffer[n:needed] = rows
        self._n = needed

    def replace(self, slots: Sequence[int], rows: Float[Tensor, "m d"]) -> None:
        """Overwrite the rows at `slots`."""
        self._buffer[torch.tensor(slots, dtype=torch.long, device=self._buffer.device)] = rows
