"""Matching pursuit on a GPU by one compiled kernel, with a Gram matrix in fixed point."""

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from itda_lens.pursuit import matching
from itda_lens.pursuit.fixed_point import compiled_loops, error_bounds, fixed_point
from itda_lens.pursuit.precision import float32_products

log = logging.getLogger(__name__)

WIDEST = 16_384
"""The largest width of activations: a program holds a residual in registers."""

WARPS = 8
LANES = 4 * 32 * WARPS
"""Correlations that a program looks at together: four for each thread, 16 bytes in float32."""

TILE = 4096
"""About how many numbers of atoms are read together where correlations are computed again."""


def serves(device: torch.device) -> bool:
    """Whether this module, not `compiled`, is for data on that device."""
    return device.type == "cuda"


def available(device: torch.device, d: int, dtype: torch.dtype) -> bool:
    """Whether the kernel can run: `d` is not too wide, and Triton is installed, compiles it, and gets a
    known result right."""
    installed = d <= WIDEST and all(map(find_spec, ("triton", "numba")))
    return serves(device) and installed and _works(device, d, dtype)


@cache
def _works(device: torch.device, d: int, dtype: torch.dtype) -> bool:
    """Try the kernel on a small problem of this kind: drivers and versions of Triton vary.

    The result is compared with that of the torch form. The problem has more atoms than lanes, a
    duplicate, and a row that is nearly an atom, for which correlations have to be computed again.
    """
    try:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(LANES + 305, d, generator=generator, dtype=dtype, device="cpu").to(device)
        atoms, x = torch.nn.functional.normalize(drawn[:-5], dim=1), drawn[-5:]
        atoms[300] = atoms[20]
        x[3], x[4] = 3 * atoms[20] + 1e-3 * x[3], atoms[7] + 3e-5 * atoms[8]
        table = fixed_point(atoms, atoms)
        ok = True
        for signed in (True, False):
            expected = matching.search(x.double(), atoms.double(), None, 3, signed, 1e-6, 0.0)
            found = search(x, atoms, table, 3, signed, 1e-6, 0.0)
            # The kernel takes the lower of equal atoms; a matrix product may round them otherwise.
            ok &= torch.equal(found[0], expected[0].masked_fill(expected[0] == 300, 20))
            ok &= torch.allclose(found[1].double(), expected[1], atol=1e-4)
    except torch.cuda.OutOfMemoryError:  # says nothing about the kernel
        raise
    except Exception as error:  # of a compiler, a driver or a launch: all kinds
        log.warning("no compiled pursuit on %s, the torch form runs: %s", device, error)
        return False
    if not ok:
        log.warning("the compiled pursuit computes other codes on %s, the torch form runs", device)
    return ok


def search(
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    gram: Int16[Tensor, "n n"],
    k: int,
    signed: bool,
    rtol: float,
    threshold: float,
) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"]]:
    """Matching pursuit, as in `matching.search`, with picks exact to float64 rounding.

    Beside the Gram matrix, memory holds the correlations: 4 bytes for each row and atom.

    Returns:
        picks: the atom of each step, -1 once the row has stopped.
        coefficients: the coefficient of each step, 0 once the row has stopped; in the dtype of x.
    """
    from itda_lens.pursuit import triton_kernels

    kernel: Any = triton_kernels.matching_rows
    (b, d), n = x.shape, len(atoms)
    loops = compiled_loops()
    x, atoms = x.detach().contiguous(), atoms.detach().contiguous()
    gram = gram if gram.stride(1) == 1 else gram.contiguous()
    energies = x.double().square().sum(dim=-1)
    unit = (x / energies.sqrt().masked_fill(energies == 0, 1)[:, None]).float()
    correlations = float32_products(unit, atoms)
    picks = torch.full((b, k), -1, dtype=torch.long, device=x.device)
    coefficients = torch.zeros(b, k, dtype=torch.float64, device=x.device)
    numbers = torch.tensor([rtol, threshold, *error_bounds(d)], dtype=torch.float64, device=x.device)
    width = 1 << (d - 1).bit_length()
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[(b,)](
            correlations, x, energies, atoms, gram, picks, coefficients,
            n, d, k, gram.stride(0), *numbers,
            SIGNED=signed, GRAM_SCALE=loops.GRAM_SCALE, REFRESH=loops.REFRESH, ROUNDING=loops.ROUNDING,
            BLOCK=LANES, BLOCK_D=width, ROWS=max(1, TILE // width), num_warps=WARPS,
        )  # fmt: skip
    return picks, coefficients.to(x.dtype)
