"""The mean of a stream, from a sum that does not round: equal to the last bit in any order."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

WINDOW = 28
"""Bits of one bin. Numbers are cut into whole multiples of `2 ** (WINDOW * i)`, which add up exactly."""

BLOCK = 64
"""Rows cut up at once, few enough to stay in a processor's cache."""

LEAST_BIN = -36
"""The smallest bin. Numbers below half of its unit, 1e-304, count as zero, since float64 cannot hold 1 /
unit."""


class ExactSum:
    """Exact sums of columns: they equal those of `math.fsum`, whatever the order and the batches.

    A number is cut into whole multiples of powers of two, one power for each bin. Multiples add up as
    integers, which do not round. Two sums, of parts of a stream, merge into the sum of the whole.
    """

    def __init__(self, d: int) -> None:
        self._d = d
        self._bins: dict[int, Tensor] = {}
        self.n = 0

    def update(self, x: Float[Tensor, "m d"]) -> None:
        """Add finite rows, of float64 or less."""
        self.n += len(x)
        for rows in x.detach().split(BLOCK):
            rest = rows.to(torch.float64, copy=True)
            exponent = _bin_of(rest)
            while exponent is not None and exponent >= LEAST_BIN:
                unit = 2.0 ** (WINDOW * exponent)
                multiples = (rest * (1 / unit)).round_()
                # Exact: bits are only taken away. At most half a unit is left, so that the multiples of
                # the next bin are at most 2 ** (WINDOW - 1).
                rest.sub_(multiples, alpha=unit)
                # Numbers this small and this few add up exactly in float64 too.
                self._add(exponent, multiples.sum(dim=0).to("cpu", torch.int64))
                exponent = min(exponent - 1, b) if (b := _bin_of(rest)) is not None else None

    def merge(self, other: "ExactSum") -> None:
        """Add all that another sum was shown."""
        self.n += other.n
        for exponent, multiples in other._bins.items():
            self._add(exponent, multiples)

    def total(self) -> Float[Tensor, " d"]:
        """The sums, rounded once, in float64 on the CPU."""
        return torch.tensor(self._rounded(1), dtype=torch.float64, device="cpu")

    def mean(self) -> Float[Tensor, " d"]:
        """The means, rounded once, in float64 on the CPU; zero before the first row."""
        return torch.tensor(self._rounded(max(1, self.n)), dtype=torch.float64, device="cpu")

    def state(self) -> dict[str, Tensor]:
        """All of it, as tensors; `load` takes it back."""
        exponents = sorted(self._bins)
        bins = [self._bins[exponent] for exponent in exponents]
        return {
            "n": torch.tensor(self.n, device="cpu"),
            "exponents": torch.tensor(exponents, dtype=torch.int64, device="cpu"),
            "bins": torch.stack(bins)
            if bins
            else torch.zeros(0, self._d, dtype=torch.int64, device="cpu"),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Become the sum that gave this state."""
        self.n = int(state["n"])
        self._bins = dict(zip(state["exponents"].tolist(), state["bins"].unbind(), strict=True))

    def _add(self, exponent: int, multiples: Tensor) -> None:
        # A block's sums are at most 2 ** 34, so that int64 has room for 2 ** 29 blocks.
        held = self._bins.get(exponent)
        self._bins[exponent] = multiples if held is None else held + multiples

    def _rounded(self, divisor: int) -> list[float]:
        if not self._bins:
            return [0.0] * self._d
        # In units of the smallest bin: whole numbers of any size, which Python divides without error.
        least = min(self._bins)
        columns = [0] * self._d
        for exponent, multiples in self._bins.items():
            shift = WINDOW * (exponent - least)
            columns = [a + (b << shift) for a, b in zip(columns, multiples.tolist(), strict=True)]
        up, down = (1 << max(0, WINDOW * least)), (1 << max(0, -WINDOW * least))
        return [(total * up) / (divisor * down) for total in columns]


def _bin_of(x: Float[Tensor, "m d"]) -> int | None:
    """The bin in which the largest number begins; None if all are zero."""
    least, most = torch.aminmax(x)
    largest = max(-least.item(), most.item())
    return math.frexp(largest)[1] // WINDOW if largest else None
