"""Layers of two models side by side: similarity matrices, and how often they find the same layer."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.records import checked

Layer = TypeVar("Layer")


@checked
def similarity_matrix(
    a: Sequence[Layer], b: Sequence[Layer], measure: Callable[[Layer, Layer], float]
) -> Float[Tensor, "layers_a layers_b"]:
    """`measure` of every layer of `a` with every layer of `b`, float64."""
    return torch.tensor([[measure(x, y) for y in b] for x in a], dtype=torch.float64)


@checked
def layer_matching_accuracy(similarity: Float[Tensor, "layers layers"]) -> float:
    """Share of layers whose most similar layer of the other model is its own (Kornblith et al. 2019).

    Layers that tie for the most similar share the hit: among m of them the right one counts 1/m.

    Raises:
        ValueError: the models have different numbers of layers, or a similarity is NaN.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or similarity.shape[0] == 0:
        raise ValueError(
            "similarity must be square, since layers can only be matched one to one, got a matrix of "
            f"shape {tuple(similarity.shape)}"
        )
    if similarity.isnan().any():
        raise ValueError("similarity must not hold NaN")
    best = (similarity == similarity.max(dim=1, keepdim=True).values).double()
    return (best.diagonal() / best.sum(dim=1)).mean().item()
