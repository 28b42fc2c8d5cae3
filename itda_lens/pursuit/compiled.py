"""The pursuits as compiled loops, for CPUs, with a Gram matrix (or some rows of it) in fixed point."""

import os
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from itda_lens.pursuit.coding import Coding
from itda_lens.pursuit.fixed_point import compiled_loops, error_bounds
from itda_lens.pursuit.gram_rows import GramRows, WholeGram
from itda_lens.pursuit.methods import PURSUITS
from itda_lens.pursuit.precision import float32_products

CORRELATION_BYTES = 32 * 1024**2
"""Bytes for the correlations of the rows that are worked on at once."""


@cache
def _workers(n: int) -> ThreadPoolExecutor:
    """Threads to run the loops in; starting them anew for each batch would cost milliseconds."""
    return ThreadPoolExecutor(n, thread_name_prefix="itda-pursuit")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # a forked process has none of the threads


def available(device: torch.device) -> bool:
    """Whether the compiled loops can run: the data are on the CPU, numba is installed, and compiles."""
    if device.type != "cpu" or find_spec("numba") is None:
        return False
    from numba import config

    return not config.DISABLE_JIT  # pyright: ignore[reportAttributeAccessIssue]


def search(
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    gram: Int16[Tensor, "n n"] | GramRows,
    coding: Coding,
) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"]]:
    """Run a compiled pursuit: picks and coefficients of its torch form, exact to float64 rounding.

    It runs in `torch.get_num_threads()` threads. `PURSUITS` must have a loop for `coding`.

    Returns:
        picks: the atom of each slot, -1 where it is unused.
        coefficients: the coefficient of each slot, 0 where it is unused; in the dtype of x.
    """
    n = len(atoms)
    picks = x.new_empty(len(x), coding.k, dtype=torch.long)
    coefficients = x.new_empty(len(x), coding.k, dtype=torch.float64)
    rows = x.detach().double().contiguous()
    energies = rows.square().sum(dim=-1)
    unit = (rows / energies.sqrt().masked_fill(energies == 0, 1)[:, None]).float()
    pursuit = PURSUITS[coding.method]
    assert pursuit.loop is not None
    most = pursuit.most_held(coding.k, *atoms.shape)
    kernel: Any = getattr(compiled_loops(), pursuit.loop.name)
    options = (*pursuit.loop.settings(coding, most, atoms.dtype), *error_bounds(atoms.shape[1]))
    atoms = atoms.detach().contiguous()
    atoms_32 = atoms.float()
    n_threads = torch.get_num_threads()
    size = max(n_threads, min(len(x), CORRELATION_BYTES // (4 * n)))
    table = WholeGram(gram) if isinstance(gram, Tensor) else gram
    if len(table) < n:
        size = min(size, len(table) // most)  # the rows of one turn fit side by side
    buffer = x.new_empty(size, n, dtype=torch.float32)
    with table.lock:
        for start in range(0, len(x), size):
            chunk = slice(start, start + size)
            correlations = float32_products(unit[chunk], atoms_32, out=buffer[: len(unit[chunk])])
            inputs = (correlations, rows[chunk], energies[chunk], atoms)
            outputs = (picks[chunk], coefficients[chunk])
            table.turn += 1
            missing = x.new_empty(len(correlations), dtype=torch.long)
            open_rows = torch.arange(len(correlations), device=x.device)
            while len(open_rows):
                arrays = (*inputs, table.rows, table.slots, table.used)
                results = (missing, *outputs)
                tasks = []
                try:
                    for part in open_rows.tensor_split(n_threads):
                        if len(part):
                            task = _workers(n_threads).submit(
                                kernel,
                                part.numpy(),
                                *(tensor.numpy() for tensor in arrays),
                                table.turn,
                                *options,
                                *(tensor.numpy() for tensor in results),
                            )
                            tasks.append(task)
                    for task in tasks:
                        task.result()
                finally:
                    wait(tasks)  # after an interrupt too: the table must not change under them
                open_rows = (missing >= 0).nonzero().flatten()
                if len(open_rows):
                    table.add(missing[open_rows].unique())
    return picks, coefficients.to(x.dtype)
