"""What an encoder derives from the atoms, kept until they change."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit import GramMatrix, Method, gram_matrix


class Prepared(NamedTuple):
    """What encoding derives from the atoms.

    Attributes:
        key: the state of the atoms, and the pursuit, that the rest was derived from and for.
        norms: of the rows, at least float32; None where all are 1 up to rounding, as they are unless
            the dictionary is stored in half precision or was rescaled.
        gram: of the unit rows, or some of its rows, or None: see `gram_matrix`.
    """

    key: tuple[object, ...]
    norms: Tensor | None
    gram: GramMatrix | None


# What is cached in inference mode must serve later passes that need gradients.
@torch.inference_mode(False)
@torch.no_grad()
def prepare(
    weights: Float[Tensor, "n d"], method: Method, signed: bool, previous: Prepared | None
) -> Prepared:
    """Norms and Gram matrix of the rows; `previous` itself if it is of the same rows and pursuit.

    Raises:
        ValueError: `weights` has NaN or infinite values.
    """
    form = (weights.data_ptr(), weights.dtype, weights.device, weights.shape)
    key = (*form, method, signed, _fingerprint(weights))
    if previous is not None and previous.key == key:
        return previous
    if not torch.isfinite(weights).all():
        raise ValueError("W_dec has NaN or infinite values")
    if weights.is_inference():
        weights = weights.clone()
    unit = weights.to(torch.promote_types(weights.dtype, torch.float32))
    norms = unit.norm(dim=-1)
    if (norms - 1).abs().max() <= 16 * torch.finfo(norms.dtype).eps:
        norms = None
    else:
        norms = norms.clamp(min=torch.finfo(norms.dtype).tiny)
        unit = unit / norms[:, None]
    return Prepared(key, norms, gram_matrix(unit, method=method, signed=signed))


def _fingerprint(weights: Float[Tensor, "n d"]) -> float:
    """A number that changes with any edit of the matrix, for the price of reading it once.

    PyTorch's version counter would not do: it does not see what is written through `.data`.
    """
    n, d = weights.shape
    left, right = (
        torch.cos(torch.arange(1, size + 1, device=weights.device) ** 2 % 1009).to(weights.dtype)
        for size in (n, d)
    )
    return (left @ (weights @ right)).item()
