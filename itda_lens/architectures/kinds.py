"""Every kind of baseline, by its name."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from itda_lens.architectures.pca import principal_components
from itda_lens.architectures.random_draw import random_atoms
from itda_lens.architectures.trained import Architecture, train_sae
from itda_lens.pursuit import Method
from itda_lens.records import Label, at_least, checked

Baseline = Literal["random", "pca", Architecture]


@checked
def baseline(
    kind: Baseline,
    activations: Float[Tensor, "n_tokens d_in"],
    *,
    d_sae: int,
    k: int,
    method: Method = "ols",
    labels: Sequence[Label] | None = None,
    epochs: int = 8,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
) -> SAE[Any]:
    """The baseline of this kind: `random_atoms`, `principal_components` (d_sae = d_in) or `train_sae`.

    Raises:
        ValueError: a setting is out of range.
    """
    at_least(1, d_sae=d_sae, epochs=epochs)
    at_least(0, seed=seed)
    if kind == "random":
        return random_atoms(
            activations, d_sae=d_sae, k=k, method=method, labels=labels, seed=seed, metadata=metadata
        )
    if kind == "pca":
        return principal_components(activations, k=k, metadata=metadata)
    return train_sae(
        activations,
        architecture=kind,
        d_sae=d_sae,
        k=k,
        epochs=epochs,
        seed=seed,
        metadata=metadata,
    )
