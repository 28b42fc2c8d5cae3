"""Norms and Gram matrix that an encoder derives from the atoms, kept until they change."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit import FLOATS, Coding, GramMatrix, PreparedAtoms

SMALL, LARGE = 1e-15, 1e15
"""Norms of rows that float32 can compute from squares."""

SMALLEST, LARGEST = 1e-30, 1e30
"""Norms of rows that coefficients in float32 can be divided by."""

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers as wide as a number, by its bytes."""


class Prepared(NamedTuple):
    """Norms and Gram matrix of the atoms, with a copy of the atoms that they belong to.

    Attributes:
        weights: a copy of the atoms that the rest was derived from. Nothing smaller is sure to show
            each change: PyTorch's version counter does not see what is written through `.data`, and a
            good digest takes ten times as long as this comparison.
        pursuit: method and sign that the Gram matrix is for.
        norms: of the rows, at least float32; None where all are 1 up to rounding, as they are unless
            the dictionary is stored in half precision or was rescaled.
        gram: of the unit rows, or some of its rows, or None: see `gram_matrix`.
    """

    weights: Float[Tensor, "n d"]
    pursuit: tuple[str, bool]
    norms: Float[Tensor, " n"] | None
    gram: GramMatrix | None

    def of(self, weights: Float[Tensor, "n d"], coding: Coding) -> bool:
        """Whether it was derived from these very bits, on this device, for this pursuit."""
        return self.pursuit == (coding.method, coding.signed) and same_bits(self.weights, weights)


# What is cached in inference mode must serve later passes that need gradients.
@torch.inference_mode(False)
@torch.no_grad()
def prepare(weights: Float[Tensor, "n d"], coding: Coding, previous: Prepared | None) -> Prepared:
    """Norms and Gram matrix of the rows; `previous` itself if it is of the same rows and pursuit.

    Raises:
        ValueError: `weights` has NaN or infinite values, fewer rows than `coding.k`, or a dtype that
            cannot be computed with; or a row is too long or too short.
    """
    if previous is not None and previous.of(weights, coding):
        return previous
    if weights.dtype not in FLOATS:
        raise ValueError(f"W_dec must be float16, bfloat16, float32 or float64, got {weights.dtype}")
    if not torch.isfinite(weights).all():
        raise ValueError("W_dec has NaN or infinite values")
    weights = weights.clone()
    unit = weights.to(torch.promote_types(weights.dtype, torch.float32))
    norms = unit.norm(dim=-1)
    if not (norms.min() > SMALL and norms.max() < LARGE):  # squares may have vanished or overflown
        norms = _exact_norms(weights).to(norms.dtype)
    if unit_up_to_rounding(norms, norms.dtype):
        norms = None
    else:
        norms = norms.clamp(min=torch.finfo(norms.dtype).tiny)
        unit = unit / norms[:, None]
    gram = PreparedAtoms(unit, coding).gram
    return Prepared(weights, (coding.method, coding.signed), norms, gram)


def _exact_norms(weights: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    norms = torch.linalg.vector_norm(weights, dim=-1, dtype=torch.float64)
    bad = ((norms > 0) & (norms < SMALLEST)) | (norms > LARGEST)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"W_dec must have rows of zeros, or of norms between {SMALLEST:.0e} and {LARGEST:.0e}, got "
            f"{norms[row]:.3g} in row {row}"
        )
    return norms


def unit_up_to_rounding(norms: Float[Tensor, " n"], dtype: torch.dtype) -> bool:
    """Whether these norms, of rows stored in `dtype`, are all 1 but for rounding."""
    rounding = max(16 * torch.finfo(norms.dtype).eps, torch.finfo(dtype).eps)
    return bool((norms - 1).abs().max() <= rounding)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one kind, on one device, and equal bit for bit."""
    if (a.dtype, a.device, a.shape) != (b.dtype, b.device, b.shape):
        return False
    a, b = (tensor.detach().view(_WORDS[tensor.itemsize]) for tensor in (a, b))
    if a.device.type == "cpu":  # numpy compares three times as fast
        return np.array_equal(a.numpy(), b.numpy())
    return torch.equal(a, b)
