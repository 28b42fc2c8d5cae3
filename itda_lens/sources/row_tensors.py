"""Rows of numbers, from whatever library, as tensors; and the checks that every row goes through."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit import first_nonfinite_row
from itda_lens.records import checked

SIZES = {torch.float64: (1e-140, 1e150)}
OTHER_SIZES = 1e-15, 1e17
"""The least and the most that the largest number of some activations may be: for float64, and for the
dtypes that are computed with in float32. Between them the squares of its row, and of numbers a
thousandth of it, are neither infinite nor zero."""

CHECKED_AT_ONCE = 2**16
"""Rows that are checked at a time: a check needs memory for a copy of them."""


def as_rows(values: Any) -> Float[Tensor, "n d"]:
    """Some rows as a tensor: of a tensor, of a numpy array, or of an array that numpy reads.

    float8 becomes float32, since torch does not compute with it. Lists of Python's numbers become
    torch's default dtype, as in `torch.tensor`. Numbers are copied only where they must be.

    Raises:
        TypeError: they are no floating-point numbers.
        ValueError: they are no rows, or rows without numbers.
    """
    if isinstance(values, list | tuple):
        values = _of_list(values)
    elif not isinstance(values, Tensor):
        values = _of_numpy(np.asarray(values))
    check_layout(values)
    if not values.is_floating_point():
        raise TypeError(f"activations must be a floating-point tensor, got {values.dtype}")
    if values.ndim != 2 or values.shape[1] < 1:
        raise ValueError(f"activations must have shape [n_tokens, d_in], got {tuple(values.shape)}")
    values = values.detach()
    return values.float() if values.element_size() == 1 else values


def check_layout(values: Any) -> None:
    """Refuse sparse tensors, of which no slices can be read.

    Raises:
        TypeError: it is one.
    """
    if isinstance(values, Tensor) and values.layout != torch.strided:
        raise TypeError(
            f"activations must be a floating-point tensor, got {values.dtype} of layout {values.layout}"
        )


class RowChecks:
    """Refuses rows that nothing can be made from, one batch after the other.

    Args:
        first: the number that the first row has in messages.
    """

    def __init__(self, first: int = 0) -> None:
        self._n = self._first = first
        self._width: int | None = None
        self._dtype: torch.dtype | None = None
        self._largest, self._largest_row = 0.0, 0

    def update(self, x: Float[Tensor, "n d"]) -> None:
        """Look at more rows.

        Raises:
            ValueError: a number is NaN, infinite or too large, or these rows have another width or dtype
                than the rows before; the message names the row.
        """
        if self._width is not None and (x.shape[1], x.dtype) != (self._width, self._dtype):
            raise ValueError(
                f"activations must have one width and one dtype, but from row {self._n} on they have "
                f"{x.shape[1]} numbers of {x.dtype}, and before that {self._width} of {self._dtype}"
            )
        self._width, self._dtype = x.shape[1], x.dtype
        for part in x.split(CHECKED_AT_ONCE):
            bad = first_nonfinite_row(part)
            if bad is not None:
                raise ValueError(
                    f"activations must be finite, but row {self._n + bad} has NaN or infinite values"
                )
            if len(part):
                sizes = part.abs().amax(dim=-1)
                largest = sizes.max().item()
                if largest > self._largest:
                    self._largest, self._largest_row = largest, self._n + int(sizes.argmax())
            self._n += len(part)
        if self._largest > self._sizes[1]:
            self._refuse_size()

    def finish(self) -> None:
        """Look at all rows together.

        Raises:
            ValueError: there were none, or all are too small.
        """
        if self._n == 0:
            raise ValueError("activations must have at least one row, got none")
        if 0 < self._largest < self._sizes[0]:
            self._refuse_size()

    @property
    def _sizes(self) -> tuple[float, float]:
        return OTHER_SIZES if self._dtype is None else SIZES.get(self._dtype, OTHER_SIZES)

    def _refuse_size(self) -> None:
        least, most = self._sizes
        raise ValueError(
            f"activations must be between {least:.0e} and {most:.0e} in size, so that their squares can "
            f"be computed, but the largest is {self._largest:.3g}, in row {self._largest_row}; multiply "
            "all by one number"
        )


@checked
def check_activations(activations: Float[Tensor, "n_tokens d_in"]) -> None:
    """Refuse activations that nothing can be made from.

    Raises:
        ValueError: no rows or no numbers in them; NaN or infinite ones; or such large or small ones that
            their squares overflow or vanish.
    """
    checks = RowChecks()
    checks.update(as_rows(activations))
    checks.finish()


def _of_list(values: Any) -> Tensor:
    if not len(values):
        raise ValueError("activations must have at least one row, got none")
    if isinstance(values[0], Tensor):
        return torch.stack([value.detach() for value in values])
    if isinstance(values[0], np.ndarray):
        return _of_numpy(np.stack(values))
    try:
        return torch.tensor(values, dtype=torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"activations must be rows of numbers: {error}") from error


def _of_numpy(values: np.ndarray) -> Tensor:
    name = values.dtype.name
    if name.startswith(("bfloat16", "float8")):  # of ml_dtypes, as in JAX: torch does not read them
        return torch.from_numpy(values.astype(np.float32))
    if values.dtype.kind != "f" or values.dtype.itemsize > 8:
        raise TypeError(f"activations must be a floating-point tensor, got {name}")
    if not (values.flags.writeable and values.dtype.isnative and min(values.strides, default=0) >= 0):
        values = np.array(values, dtype=values.dtype.newbyteorder("="))
    return torch.from_numpy(values)
