"""How often each atom fires, in the file in which SAELens keeps it beside the weights."""

from pathlib import Path

import torch
from jaxtyping import Float
from sae_lens.constants import SPARSITY_FILENAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from itda_lens.records import replacing

EPSILON = 1e-10
"""Added to a density before its logarithm is taken, as by SAELens's trainer: dead features read -10."""


def load_sparsity(folder: str | Path) -> Float[Tensor, " d_sae"] | None:
    """The feature densities beside a dictionary; None where there is no `sparsity.safetensors`.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / SPARSITY_FILENAME
    if not path.exists():
        return None
    try:
        return (10 ** load_file(path)["sparsity"].double() - EPSILON).clamp(min=0)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error!r}") from error


def save_sparsity(folder: str | Path, feature_density: Float[Tensor, " d_sae"]) -> Path:
    """Write `sparsity.safetensors` into the folder of a dictionary.

    SAELens's readers and uploads take it from there: `SAE.from_pretrained_with_cfg_and_sparsity` returns
    it, `upload_saes_to_huggingface` uploads it. `ITDA.save_model` removes one, since it belongs to
    the weights that it was measured with.

    Args:
        folder: where the dictionary is saved.
        feature_density: share of tokens at which each atom has a nonzero coefficient.

    Returns:
        Path of the file; its one tensor "sparsity" is `log10(feature_density + 1e-10)`.

    Raises:
        ValueError: densities are not between 0 and 1.
        OSError: the file cannot be written.
    """
    if not ((feature_density >= 0) & (feature_density <= 1)).all():
        raise ValueError("feature_density must be between 0 and 1 for every atom")
    path = Path(folder) / SPARSITY_FILENAME
    with replacing(path) as (temporary,):
        save_file({"sparsity": torch.log10(feature_density.cpu().float() + EPSILON)}, temporary)
    return path
