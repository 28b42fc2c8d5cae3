"""Principal components, as a dictionary."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit import Coding
from itda_lens.records import checked
from itda_lens.sae import ITDA, assemble
from itda_lens.sources import check_activations


@checked
def principal_components(
    activations: Float[Tensor, "n_tokens d_in"],
    *,
    k: int,
    metadata: Mapping[str, Any] | None = None,
) -> ITDA:
    """The principal components as a dictionary, d_sae = d_in; a token uses its k largest coefficients.

    Atoms are orthonormal, in order of decreasing variance. So matching pursuit picks just the k largest.

    Raises:
        ValueError: k is more than d_in.
    """
    check_activations(activations)
    mean = activations.mean(dim=0, dtype=torch.float64).to(activations.dtype)
    centred = activations.double() - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    atoms = vectors.T.flip(0).to(activations.dtype)
    return assemble(atoms, mean, coding=Coding(k, "mp"), metadata=metadata)
