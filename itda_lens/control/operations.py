"""Operations: how the coefficients of an edit's atoms change."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.control.seen import Rows
from itda_lens.records import check_fields

Unit = Literal["absolute", "norm", "typical"]
"""Units of an amount. "absolute": units of coefficients; for an atom of unit norm, those of the
activations. "norm": shares of the norm of the activation that is changed, less `b_dec`. "typical":
multiples of the atom's own typical coefficient (`typical_coefficients`)."""


@dataclass(frozen=True)
class Scale:
    """Multiply the coefficients: 0 removes the atoms, 1 changes nothing, a negative factor inverts them.

    Raises:
        TypeError: the factor is not a number.
    """

    factor: float = 0.0

    def __post_init__(self) -> None:
        _check_finite(self)

    def change(self, rows: Rows) -> Float[Tensor, "rows d_in"]:
        """See `Operation.change`."""
        # Not the difference of two products: a factor of 1 must change nothing at all.
        return rows.moved(rows.coefficients * (self.factor - 1))


@dataclass(frozen=True)
class Clamp:
    """Set the coefficients to fixed values, whether the atoms fire or not.

    Attributes:
        values: a number for all atoms, or one for each.
        unit: what the values are measured in; see `Unit`.
        typical: the typical coefficient of each atom, for that unit only.

    Raises:
        ValueError: the unit is "typical" and `typical` is missing.
    """

    values: float | Sequence[float]
    unit: Unit = "absolute"
    typical: Sequence[float] | None = None

    def __post_init__(self) -> None:
        _check_finite(self)
        _check_typical(self.unit, self.typical)

    def change(self, rows: Rows) -> Float[Tensor, "rows d_in"]:
        """See `Operation.change`."""
        wanted = _in_unit(rows, "values", self.values, self.unit, self.typical)
        return rows.moved(wanted - rows.coefficients)


@dataclass(frozen=True)
class Add:
    """Add to the coefficients, whether the atoms fire or not.

    Attributes:
        amount: a number for all atoms, or one for each.
        unit: what the amount is measured in; see `Unit`.
        typical: the typical coefficient of each atom, for that unit only.

    Raises:
        ValueError: the unit is "typical" and `typical` is missing.
    """

    amount: float | Sequence[float]
    unit: Unit = "absolute"
    typical: Sequence[float] | None = None

    def __post_init__(self) -> None:
        _check_finite(self)
        _check_typical(self.unit, self.typical)

    def change(self, rows: Rows) -> Float[Tensor, "rows d_in"]:
        """See `Operation.change`."""
        return rows.moved(_in_unit(rows, "amount", self.amount, self.unit, self.typical))


@dataclass(frozen=True)
class Swap:
    """Give the atoms the coefficients that they had in another prompt, position by position.

    `swapped` makes one from a prompt.

    Attributes:
        values: for each position of the other prompt, from 0 on, the coefficients of the atoms. Later
            positions stay as they are.
        read: for each position, whether it was read; None if all were. Others stay as they are.
    """

    values: Sequence[Sequence[float]]
    read: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "values", tuple(tuple(map(float, row)) for row in self.values))
        if not self.values or len({len(row) for row in self.values}) != 1:
            raise ValueError("values must hold a list of coefficients for each position, equally long")
        if self.read is not None:
            object.__setattr__(self, "read", tuple(self.read))
            if len(self.read) != len(self.values):
                raise ValueError(f"read must have {len(self.values)} entries, got {len(self.read)}")

    def change(self, rows: Rows) -> Float[Tensor, "rows d_in"]:
        """See `Operation.change`."""
        wanted = rows.coefficients.new_tensor(self.values)
        _check_count("values", wanted.shape[1], rows)
        known = torch.tensor(self.read or [True] * len(wanted), device=wanted.device)
        inside = (rows.positions >= 0) & (rows.positions < len(wanted))
        at = rows.positions.clamp(0, len(wanted) - 1)
        inside &= known[at]
        return rows.moved(torch.where(inside[:, None], wanted[at] - rows.coefficients, 0.0))


@dataclass(frozen=True)
class ProjectOut:
    """Remove everything that the activations have in the span of the atoms, whether they fire or not.

    Attributes:
        centred: whether `b_dec`, the mean activation of many dictionaries, keeps its part of the span.
    """

    centred: bool = True

    def __post_init__(self) -> None:
        check_fields(self)

    def change(self, rows: Rows) -> Float[Tensor, "rows d_in"]:
        """See `Operation.change`."""
        x = rows.x.to(torch.promote_types(rows.x.dtype, torch.float32))
        if self.centred:
            x = x - rows.sae.b_dec.to(x.dtype)
        # An orthonormal basis of the span; atoms may depend on one another.
        _, sizes, basis = torch.linalg.svd(rows.directions.to(x.dtype), full_matrices=False)
        basis = basis[sizes > sizes.max() * max(rows.directions.shape) * torch.finfo(x.dtype).eps]
        return -(x @ basis.T) @ basis


OPERATIONS: dict[str, type] = {kind.__name__: kind for kind in (Scale, Clamp, Add, Swap, ProjectOut)}
"""Operations by the names that saved edits give them."""


def _check_finite(operation: Scale | Clamp | Add) -> None:
    check_fields(operation)
    for name, value in vars(operation).items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = tuple(map(float, value))
            object.__setattr__(operation, name, value)
        numbers = value if isinstance(value, tuple) else [value]
        if any(isinstance(n, float) and not abs(n) < float("inf") for n in numbers):
            raise ValueError(f"{name} must be finite, got {value}")


def _check_typical(unit: str, typical: Sequence[float] | None) -> None:
    if (unit == "typical") != (typical is not None):
        raise ValueError(
            "typical must be given for unit='typical', and for no other unit; `typical_coefficients` "
            "measures it"
        )


def _check_count(name: str, n: int, rows: Rows) -> None:
    if n != len(rows.atoms):
        raise ValueError(f"{name} must hold a number for each of {len(rows.atoms)} atoms, got {n}")


def _in_unit(
    rows: Rows, name: str, amount: float | Sequence[float], unit: str, typical: Sequence[float] | None
) -> Float[Tensor, "rows m"]:
    """An amount as coefficients."""
    found = rows.coefficients.new_tensor(amount)
    if found.ndim:
        _check_count(name, len(found), rows)
    if unit == "typical":
        scale = rows.coefficients.new_tensor(typical)
        _check_count("typical", len(scale), rows)
        found = found * scale
    elif unit == "norm":
        norms = (rows.x - rows.sae.b_dec).norm(dim=-1, keepdim=True).to(found.dtype)
        found = found * norms
    return found.expand(rows.coefficients.shape)
