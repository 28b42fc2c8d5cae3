"""The pursuits by compiled loops: CPU only, with a Gram matrix in fixed point."""

import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from itda_lens.pursuit.orthogonal import dependence_tolerance

CORRELATION_BYTES = 32 * 1024**2
"""Memory for the correlations of the rows that are worked on at once."""

PRODUCT_ROWS = 256
"""Rows of the Gram matrix that exist in float32 at a time."""

FLOAT32_UNIT = 2.0**-24

_compiling = threading.Lock()
"""Held while the kernels are imported: numba's decorators are not meant to race."""


def available(device: torch.device) -> bool:
    """Whether the compiled loops can run: numba is installed, and the data are on the CPU."""
    return device.type == "cpu" and find_spec("numba") is not None


def supports(method: str, signed: bool) -> bool:
    """Whether there is a compiled loop for this pursuit; non-negative OMP has none."""
    return method == "mp" or signed


def fixed_point(a: Float[Tensor, "m d"], b: Float[Tensor, "n d"]) -> Int16[Tensor, "m n"]:
    """Inner products of unit rows as int16, `round(32767 <a, b>)`.

    Rounding moves each by at most 1.6e-5 from its float32 product.
    """
    out = torch.empty(len(a), len(b), dtype=torch.int16)
    a, b = a.detach().float(), b.detach().float()
    kernels = _kernels()
    for start in range(0, len(a), PRODUCT_ROWS):
        products = a[start : start + PRODUCT_ROWS] @ b.T
        kernels.quantize(products.numpy(), out[start : start + PRODUCT_ROWS].numpy())
    return out


def search(
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    gram: Int16[Tensor, "n n"],
    k: int,
    method: str,
    signed: bool,
    rtol: float,
    threshold: float,
) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"]]:
    """What `matching.search` and `orthogonal.search` do, with picks exact to float64 rounding.

    Uses as many threads as torch does (`torch.get_num_threads()`).

    Returns:
        picks: the atom of each slot, -1 where it is unused.
        coefficients: of each slot, 0 where it is unused; in the dtype of x.
    """
    n = len(atoms)
    picks = torch.full((len(x), k), -1, dtype=torch.long)
    coefficients = torch.zeros(len(x), k, dtype=torch.float64)
    rows = x.detach().double().contiguous()
    atoms = atoms.detach().contiguous()
    gram = _whole_rows(gram)
    energies = rows.square().sum(dim=-1)
    unit = (rows / energies.sqrt().masked_fill(energies == 0, 1)[:, None]).float()
    atoms_32 = atoms.float()
    n_threads = torch.get_num_threads()
    size = max(n_threads, min(len(x), CORRELATION_BYTES // (4 * n)))
    buffer = torch.empty(size, n)
    with ThreadPoolExecutor(n_threads) as pool:
        for start in range(0, len(x), size):
            chunk = slice(start, start + size)
            correlations = torch.mm(unit[chunk], atoms_32.T, out=buffer[: len(unit[chunk])])
            arguments = (correlations, rows[chunk], energies[chunk], atoms, gram)
            results = (picks[chunk], coefficients[chunk])
            _run(pool, n_threads, method, signed, rtol, threshold, arguments, results)
    return picks, coefficients.to(x.dtype)


def _run(
    pool: ThreadPoolExecutor,
    n_threads: int,
    method: str,
    signed: bool,
    rtol: float,
    threshold: float,
    arguments: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
) -> None:
    kernels = _kernels()
    atoms = arguments[3]
    tolerance = dependence_tolerance(atoms.dtype)
    rounding = _product_error(atoms.shape[1])
    errors = (rounding, rounding + 0.5 / kernels.GRAM_SCALE + FLOAT32_UNIT)
    if method == "mp":
        kernel, options = kernels.matching_rows, (signed, rtol, threshold, *errors)
    else:
        kernel, options = kernels.orthogonal_rows, (rtol, threshold, tolerance, *errors)
    arrays = [tensor.numpy() for tensor in (*arguments, *results)]
    inputs, outputs = arrays[: len(arguments)], arrays[len(arguments) :]
    b = len(arguments[0])
    edges = [b * i // n_threads for i in range(n_threads + 1)]
    tasks = [
        pool.submit(kernel, first, last, *inputs, *options, *outputs)
        for first, last in pairwise(edges)
        if last > first
    ]
    for task in tasks:
        task.result()


def _whole_rows(gram: Int16[Tensor, "n n"]) -> Int16[Tensor, "n m"]:
    """Rows without gaps, which the kernels want: of the larger matrix if `gram` is a corner of one."""
    n, pitch = len(gram), gram.stride(0)
    if gram.stride(1) == 1 and pitch >= n and gram.storage_offset() == 0:
        return gram.as_strided((n, pitch), (pitch, 1))
    return gram.contiguous()


def _product_error(d: int) -> float:
    """Bound on the error of an inner product of two unit vectors by a matrix product in float32.

    Rounding errors behave as independent ones: one product is off by more than 8 sqrt(d) units with a
    probability of at most 2 d exp(-32) (Higham & Mary 2019). Where the user allows reduced precision in
    matrix products, torch may round the vectors to bfloat16 first.
    """
    reduced = 0.0 if torch.get_float32_matmul_precision() == "highest" else 2.0**-7
    return 8 * d**0.5 * FLOAT32_UNIT + 2 * FLOAT32_UNIT + reduced


def _kernels() -> Any:
    with _compiling:
        from itda_lens.pursuit import kernels
    return kernels
