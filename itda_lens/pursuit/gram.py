"""The Gram matrix of a dictionary, in the form that the pursuits run fastest with."""

import psutil
import torch
from jaxtyping import Float, Int16, Shaped
from torch import Tensor

from itda_lens.pursuit import compiled, gpu
from itda_lens.pursuit.fixed_point import fixed_point, fixed_point_gram
from itda_lens.pursuit.gram_rows import GramRows
from itda_lens.pursuit.methods import pursuit_named
from itda_lens.pursuit.precision import at_least_float32, full_precision
from itda_lens.pursuit.transforms import beneath

GRAM_BUDGET_BYTES = 2 * 1024**3
"""Default memory for a whole matrix, in bytes: enough for 32,768 atoms in fixed point, or 23,170 in
float32. It is a constant, not a share of the memory that happens to be free: the torch forms of pursuit
round differently with and without a Gram matrix, and equal inputs must give equal bits."""

GPU_SHARE = 1 / 3
"""Share of a GPU's free memory that a fixed-point matrix may take there, if that is more than
`GRAM_BUDGET_BYTES`. A matrix of 65,536 atoms takes 8 GiB."""

ROWS_SHARE = 1 / 3
"""Share of the available memory that `GramRows` may take for a larger matrix. Codes do not depend on
it."""

MOST_ROWS_BYTES = 8 * 1024**3
"""Most bytes that `GramRows` takes by default: a container may allow less than the machine reports."""

GramMatrix = Float[Tensor, "n n"] | Int16[Tensor, "n n"] | GramRows
"""A Gram matrix: floating point for the torch forms; int16 fixed point, or rows of it, for the compiled
ones."""


def gram_dtype(atoms: Float[Tensor, "n d"], method: str = "mp", signed: bool = True) -> torch.dtype:
    """The dtype of a Gram matrix for this pursuit: int16 where a compiled form of it can run.

    Otherwise it is the dtype of the atoms, but at least float32.

    Raises:
        ValueError: there is no pursuit `method`.
    """
    pursuit, d = pursuit_named(method), atoms.shape[1]
    if gpu.serves(atoms.device):
        fixed = pursuit.on_gpu is not None and gpu.available(atoms.device, d, atoms.dtype)
    else:
        fixed = pursuit.has_loop(signed) and compiled.available(atoms.device)
    return torch.int16 if fixed else at_least_float32(atoms.dtype)


def gram_fits(n_atoms: int, dtype: torch.dtype, budget_bytes: int = GRAM_BUDGET_BYTES) -> bool:
    """Whether `n_atoms**2` numbers of `dtype` fit into `budget_bytes`."""
    return n_atoms * n_atoms * dtype.itemsize <= budget_bytes


def inner_products(
    a: Float[Tensor, "m d"], b: Float[Tensor, "n d"], dtype: torch.dtype
) -> Float[Tensor, "m n"] | Int16[Tensor, "m n"]:
    """`a @ b.T`, as rows of a Gram matrix of this dtype; for int16 see `fixed_point`."""
    if dtype == torch.int16:
        return fixed_point(a, b)
    with full_precision(a.device):
        return a.to(dtype) @ b.to(dtype).T


def gram_matrix(
    atoms: Float[Tensor, "n d"],
    budget_bytes: int | None = None,
    *,
    method: str = "mp",
    signed: bool = True,
) -> GramMatrix | None:
    """`atoms @ atoms.T` for this pursuit, or a substitute if it is larger than its budget.

    With the Gram matrix, a pursuit step reads one of its rows for each activation (under OMP one for
    each atom held), and memory limits the speed. Without it, a step multiplies residuals with all atoms,
    and arithmetic limits the speed. Both give the same codes up to rounding. Pass the result on as the
    `gram` argument of `encode`.

    Args:
        budget_bytes: memory for the result; default: `GRAM_BUDGET_BYTES`, or, if that is more, a third
            of a GPU's free memory and, for `GramRows`, a third of the available memory (up to 8 GiB).

    Returns:
        The matrix. If it is over the budget: a `GramRows` for pursuits that are compiled for a CPU, with
        codes that are equal bit for bit; None for the others.
    """
    return beneath(lambda plain: _gram_matrix(plain, budget_bytes, method, signed), atoms)


def leave_out(gram: Shaped[Tensor, "n n"], start: int, stop: int) -> Shaped[Tensor, "m m"]:
    """A copy of a whole Gram matrix without the atoms from `start` to before `stop`."""
    size = len(gram) - (stop - start)
    left = gram.new_empty(size, size)
    for rows, of_rows in ((slice(start), slice(start)), (slice(start, None), slice(stop, None))):
        left[rows, :start] = gram[of_rows, :start]
        left[rows, start:] = gram[of_rows, stop:]
    return left


def _whole_budget(device: torch.device, dtype: torch.dtype) -> int:
    if device.type != "cuda" or dtype != torch.int16:
        return GRAM_BUDGET_BYTES
    return max(GRAM_BUDGET_BYTES, int(GPU_SHARE * torch.cuda.mem_get_info(device)[0]))


def _gram_matrix(
    atoms: Tensor, budget_bytes: int | None, method: str, signed: bool
) -> GramMatrix | None:
    dtype = gram_dtype(atoms, method, signed)
    whole = _whole_budget(atoms.device, dtype) if budget_bytes is None else budget_bytes
    if gram_fits(len(atoms), dtype, whole):
        return fixed_point_gram(atoms) if dtype == torch.int16 else inner_products(atoms, atoms, dtype)
    if dtype != torch.int16 or gpu.serves(atoms.device):
        return None
    if budget_bytes is None:
        available = psutil.virtual_memory().available
        budget_bytes = max(GRAM_BUDGET_BYTES, min(int(ROWS_SHARE * available), MOST_ROWS_BYTES))
    return GramRows(atoms, budget_bytes)
