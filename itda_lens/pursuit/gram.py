"""The Gram matrix of a dictionary, and whether it is worth its memory."""

import torch
from jaxtyping import Float
from torch import Tensor

GRAM_BUDGET_BYTES = 2 * 1024**3
"""Default budget: 23,170 atoms in float32. A constant, not a share of the memory that happens to be
free, because the two forms of pursuit round differently and the same inputs must give the same bits."""


def gram_fits(n_atoms: int, dtype: torch.dtype, budget_bytes: int = GRAM_BUDGET_BYTES) -> bool:
    """Whether `n_atoms**2` numbers of `dtype` fit into `budget_bytes`."""
    return n_atoms * n_atoms * dtype.itemsize <= budget_bytes


def gram_matrix(
    atoms: Float[Tensor, "n d"], budget_bytes: int = GRAM_BUDGET_BYTES
) -> Float[Tensor, "n n"] | None:
    """`atoms @ atoms.T`, or None where it would not fit into `budget_bytes`.

    With the Gram matrix a pursuit step costs one row of it per activation (memory-bound); without it,
    one product of the residuals with all atoms (arithmetic-bound). Both give the same codes up to
    rounding; pass the result on as the `gram` argument of the pursuits.
    """
    if not gram_fits(len(atoms), atoms.dtype, budget_bytes):
        return None
    return atoms @ atoms.T
