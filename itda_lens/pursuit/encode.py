"""The pursuits as functions of whole tensors: checks, chunks, dtypes and gradients."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itda_lens.pursuit import compiled, gpu, least_squares, matching, orthogonal
from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.finite import first_nonfinite_row
from itda_lens.pursuit.gram import GramMatrix, gram_dtype
from itda_lens.pursuit.gram_rows import GramRows

Method = Literal["mp", "omp", "ols"]

_SEARCH = {"mp": matching.search, "omp": orthogonal.search, "ols": least_squares.search}
_REPLAY = {"mp": matching.replay, "omp": orthogonal.replay, "ols": orthogonal.replay}

DEFAULT_RTOL = 1e-3
"""A row stops once |residual| <= rtol * |x|. An activation that is itself an atom leaves a residual of
rounding errors, which must not become coefficients; what is given up is at most 1e-6 of the energy."""

ROWS_PER_CHUNK = {"compiled": 1024, "gram": 64, "gemm": 1024}
"""Rows worked on at once on a CPU: with a Gram matrix in torch, so few that their correlations stay in
cache; otherwise enough for the matrix product to run at full speed."""

CUDA_ROWS_PER_CHUNK = 4096
"""On a GPU: enough to fill it; bounds the memory for correlations."""


def encode(
    x: Float[Tensor, "*batch d"],
    atoms: Float[Tensor, "n d"],
    k: int,
    *,
    method: Method = "mp",
    signed: bool = True,
    rtol: float = DEFAULT_RTOL,
    threshold: float = 0.0,
    gram: GramMatrix | None = None,
) -> SparseCodes:
    """Sparse codes of `x` over unit-norm `atoms`, at most `k` nonzeros a row.

    Each row depends on itself alone. Ties go to the atom of lowest index. Two equal atoms never share
    a code under "omp" and "ols" and need not under "mp", and the lower index wins where their
    correlations are equal bit for bit. Codes of bf16 and fp16 are those of the same numbers in
    float32, and returned in it. Differentiable in `x` and `atoms` given the support.

    Args:
        x: activations, centred by the caller if at all; 1-D to n-D, any floating dtype.
        atoms: dictionary, rows of unit norm.
        k: most nonzeros per row, 1 <= k <= n.
        method: "mp", matching pursuit (Mallat & Zhang 1993), `k` steps that may pick an atom again;
            "omp", orthogonal matching pursuit (Pati et al. 1993), which re-solves for all
            coefficients at each step: better codes, slower; "ols", orthogonal least squares (Chen,
            Billings & Luo 1989), which picks the atom with which the re-solved error is least, goes on
            for a quarter more than `k` picks and drops those again without which least is lost: better
            still, slower still.
        signed: False restricts coefficients to >= 0; not for "ols".
        rtol: stop a row at |residual| <= rtol |x|; 0 never stops early.
        threshold: a row stops before it picks an atom whose correlation with the residual is smaller,
            in the units of x: `k` is the most then, and rows that need few atoms take few. The next
            pick of MP removes the square of its correlation, that of OMP at least as much. Under "ols"
            every atom of a code removes at least the square of `threshold`, and a row goes on for atoms
            that remove somewhat less, of which some may be worth it once others are dropped. See
            `calibrate_threshold`.
        gram: `gram_matrix(atoms, method=method, signed=signed)`. In int16 it selects the compiled
            forms; on a CPU their result for a row does not depend, bit for bit, on the rows beside it,
            nor on how many rows of the Gram matrix fit into memory. In floating point it selects torch's
            Gram form; None, torch's GEMM form.

    Raises:
        ValueError: shapes do not fit, k, rtol or threshold is out of range, an unknown method or one
            that is not for `signed`, NaN or infinity in x.
        TypeError: x or atoms are not floating point.
    """
    _check(x, atoms, k, method, signed, rtol, threshold, gram)
    dtype = torch.promote_types(torch.promote_types(x.dtype, atoms.dtype), torch.float32)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    atoms = atoms.to(dtype)
    if isinstance(gram, Tensor) and gram.is_floating_point():
        gram = gram.detach().to(dtype)
    if not len(rows):
        empty = torch.zeros(*x.shape[:-1], k, device=x.device)
        return SparseCodes(empty.long(), empty.to(dtype))
    chunks = [
        _encode_chunk(chunk, atoms, gram, k, method, signed, float(rtol), float(threshold))
        for chunk in rows.split(_chunk_rows(rows, gram))
    ]
    shape = (*x.shape[:-1], k)
    return SparseCodes(
        torch.cat([chunk.indices for chunk in chunks]).reshape(shape),
        torch.cat([chunk.values for chunk in chunks]).reshape(shape),
    )


def _encode_chunk(
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    gram: GramMatrix | None,
    k: int,
    method: Method,
    signed: bool,
    rtol: float,
    threshold: float,
) -> SparseCodes:
    """Search without gradients; then, where gradients are wanted, the coefficients once more."""
    with torch.no_grad():
        if gram is None or (isinstance(gram, Tensor) and gram.is_floating_point()):
            picks, coefficients = _SEARCH[method](x, atoms, gram, k, signed, rtol, threshold)
        elif isinstance(gram, Tensor) and gpu.serves(x.device):
            picks, coefficients = gpu.search(x, atoms, gram, k, signed, rtol, threshold)
        else:
            picks, coefficients = compiled.search(x, atoms, gram, k, method, signed, rtol, threshold)
    if torch.is_grad_enabled() and (x.requires_grad or atoms.requires_grad):
        coefficients = _REPLAY[method](x, atoms, picks)
    return _merge(picks, coefficients)


def _merge(picks: Int[Tensor, "b k"], coefficients: Float[Tensor, "b k"]) -> SparseCodes:
    """Add up the coefficients of repeated picks and move the used slots to the front."""
    same = picks[:, :, None] == picks[:, None, :]
    first = same.byte().argmax(dim=-1)  # for each slot, the first slot that picked its atom
    values = torch.zeros_like(coefficients).scatter_add(-1, first, coefficients)
    values = values.masked_fill(picks < 0, 0)
    order = (values == 0).byte().argsort(dim=-1, stable=True)
    values = values.gather(-1, order)
    indices = picks.gather(-1, order).masked_fill(values == 0, 0)
    return SparseCodes(indices, values)


def _chunk_rows(rows: Tensor, gram: GramMatrix | None) -> int:
    if rows.device.type != "cpu":
        return CUDA_ROWS_PER_CHUNK
    if gram is None:
        return ROWS_PER_CHUNK["gemm"]
    return ROWS_PER_CHUNK["compiled" if gram.dtype == torch.int16 else "gram"]


def check_k(k: int, n_atoms: int) -> None:
    """Raise ValueError where codes of `k` nonzeros cannot be had of so many atoms."""
    if not 1 <= k <= n_atoms:
        raise ValueError(f"k must be between 1 and the number of atoms ({n_atoms}), got {k}")


def check_sign(method: str, signed: bool) -> None:
    """Raise ValueError where this pursuit has no form without signs."""
    if method == "ols" and not signed:
        raise ValueError("method must be 'mp' or 'omp' for signed=False, got 'ols'")


def _check(
    x: Tensor,
    atoms: Tensor,
    k: int,
    method: str,
    signed: bool,
    rtol: float,
    threshold: float,
    gram: GramMatrix | None,
) -> None:
    for name, tensor in (("x", x), ("atoms", atoms)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got dtype {tensor.dtype}")
    if atoms.ndim != 2:
        raise ValueError(f"atoms must have shape [n, d], got {tuple(atoms.shape)}")
    n, d = atoms.shape
    if x.ndim < 1 or x.shape[-1] != d:
        raise ValueError(f"x must have {d} numbers per row like the atoms, got {tuple(x.shape)}")
    check_k(k, n)
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    check_sign(method, signed)
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol must be at least 0 and below 1, got {rtol}")
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold must be at least 0 and finite, got {threshold}")
    if gram is not None and gram.shape != (n, n):
        raise ValueError(f"gram must have shape {(n, n)}, got {tuple(gram.shape)}")
    if isinstance(gram, Tensor) and gram.device != x.device:
        raise ValueError(f"gram must be on the device of x, {x.device}, got {gram.device}")
    if isinstance(gram, GramRows) and gpu.serves(x.device):
        raise ValueError("gram must be a tensor on a GPU, got GramRows; pass gram_matrix(atoms)")
    if (
        gram is not None
        and not gram.dtype.is_floating_point
        and gram.dtype != gram_dtype(atoms, method, signed)
    ):
        raise ValueError(
            f"gram in {gram.dtype} does not serve method={method!r}, signed={signed} on "
            f"{atoms.device.type}; pass gram_matrix(atoms, method=method, signed=signed)"
        )
    needed = compiled.rows_in_turn(method, k, n, d)
    if isinstance(gram, GramRows) and len(gram) < needed:
        raise ValueError(
            f"gram must have room for at least {needed} rows at k={k}, got {len(gram)}; "
            "give gram_matrix a larger budget"
        )
    bad = first_nonfinite_row(x.reshape(-1, d))
    if bad is not None:
        raise ValueError(f"x has NaN or infinite values, first in row {bad}")
