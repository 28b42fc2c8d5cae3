"""The table of pursuits, one row each. To add a pursuit, write its functions and add a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from itda_lens.pursuit import gpu, least_squares, matching, orthogonal

if TYPE_CHECKING:
    from itda_lens.pursuit.coding import Coding

Search = Callable[..., tuple[Tensor, Tensor]]
"""A pursuit of one chunk of rows: (x, atoms, gram, k, signed, rtol, threshold) -> (picks,
coefficients)."""


@dataclass(frozen=True)
class Loop:
    """A compiled loop for CPUs."""

    name: str
    """Name of the function in `kernels.py`."""

    settings: Callable[["Coding", int, torch.dtype], tuple[Any, ...]]
    """(coding, most atoms that a row holds at once, dtype of the atoms) -> arguments of the loop. They
    stand between the table of Gram rows and the error bounds."""

    nonnegative: bool = False
    """Whether it serves codes without signs too."""


@dataclass(frozen=True)
class Pursuit:
    """One pursuit, in all its forms. Only the torch forms are needed."""

    search: Search
    """The torch form, with a Gram matrix in floating point or none."""

    replay: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x, atoms, picks) -> coefficients, as a differentiable function of x and atoms."""

    nonnegative: bool = True
    """Whether it has a form whose coefficients are not negative."""

    loop: Loop | None = None
    """The form for CPUs, run by `compiled.search`."""

    on_gpu: Search | None = None
    """The form for GPUs, with and without signs, with a Gram matrix in int16."""

    most_held: Callable[[int, int, int], int] = lambda k, n, d: k
    """(k, number of atoms, width) -> the most atoms that a row holds at once, and so the rows of the
    Gram matrix that it needs."""

    def has_loop(self, signed: bool) -> bool:
        """Whether there is a compiled loop for codes with or without signs."""
        return self.loop is not None and (signed or self.loop.nonnegative)


PURSUITS = {
    "mp": Pursuit(
        search=matching.search,
        replay=matching.replay,
        loop=Loop(
            "matching_rows",
            lambda coding, most, dtype: (coding.signed, coding.rtol, coding.threshold),
            nonnegative=True,
        ),
        on_gpu=gpu.search,
    ),
    "omp": Pursuit(
        search=orthogonal.search,
        replay=orthogonal.replay,
        loop=Loop(
            "orthogonal_rows",
            lambda coding, most, dtype: (
                coding.signed, coding.rtol, coding.threshold, orthogonal.dependence_tolerance(dtype),
            ),
            nonnegative=True,
        ),
    ),
    "ols": Pursuit(
        search=least_squares.search,
        replay=orthogonal.replay,
        nonnegative=False,
        loop=Loop(
            "least_squares_rows",
            lambda coding, most, dtype: (
                most, coding.rtol, coding.threshold,
                least_squares.AHEAD * coding.threshold, least_squares.LEAST_DISTANCE,
            ),
        ),
        most_held=least_squares.most_held,
    ),
}  # fmt: skip
"""Every pursuit, by the name that `Coding.method` gives it."""


def pursuit_named(method: str) -> Pursuit:
    """The row of `PURSUITS` with this name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(method, str) or method not in PURSUITS:
        raise ValueError(f"method must be one of {tuple(PURSUITS)}, got {method!r}")
    return PURSUITS[method]
