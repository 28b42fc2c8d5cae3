"""Activations drawn at random, as a dictionary."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit import Coding, Method
from itda_lens.records import Label, at_least, checked
from itda_lens.sae import ITDA, assemble
from itda_lens.sources import check_activations


@checked
def random_atoms(
    activations: Float[Tensor, "n_tokens d_in"],
    *,
    d_sae: int,
    k: int,
    method: Method = "ols",
    labels: Sequence[Label] | None = None,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
) -> ITDA:
    """A dictionary of activations drawn at random, to show how much choosing atoms improves on it.

    Raises:
        ValueError: d_sae is more than there are activations, or k is out of range.
    """
    check_activations(activations)
    at_least(0, seed=seed)
    n = len(activations)
    if not 1 <= d_sae <= n:
        raise ValueError(f"d_sae must be between 1 and the {n} activations, got {d_sae}")
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:d_sae].sort().values
    mean = activations.mean(dim=0, dtype=torch.float64).to(activations.dtype)
    return assemble(
        torch.nn.functional.normalize(activations[drawn] - mean, dim=-1),
        mean,
        coding=Coding(k, method),
        labels=None if labels is None else [labels[i] for i in drawn.tolist()],
        metadata=metadata,
    )
