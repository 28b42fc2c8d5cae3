"""How often each atom fires, in the file in which SAELens keeps it beside the weights."""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.constants import SAE_CFG_FILENAME, SPARSITY_FILENAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from itda_lens.records import checked, replacing
from itda_lens.sae.saved import WEIGHTS_KEY, write_tensors

EPSILON = 1e-10
"""Added to a density before its logarithm is taken, as by SAELens's trainer: dead features read -10."""


@checked
def load_sparsity(folder: str | Path) -> Float[Tensor, " d_sae"] | None:
    """The feature densities beside a dictionary; None where there is no `sparsity.safetensors`.

    Raises:
        ValueError: the file is damaged, or was measured with other weights than are beside it.
    """
    path = Path(folder) / SPARSITY_FILENAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as tensors:
            measured = (tensors.metadata() or {}).get(WEIGHTS_KEY)
            logarithms = tensors.get_tensor("sparsity").double()
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {error!r}") from error
    if measured is not None and measured != _weights_of(path.parent):
        raise ValueError(f"{path} was measured with other weights than {path.parent} holds")
    return (10**logarithms - EPSILON).clamp(min=0)


@checked
def save_sparsity(folder: str | Path, feature_density: Float[Tensor, " d_sae"]) -> Path:
    """Write `sparsity.safetensors` into the folder of a dictionary.

    SAELens's readers and uploads take it from there: `SAE.from_pretrained_with_cfg_and_sparsity` returns
    it, `upload_saes_to_huggingface` uploads it. `ITDA.save_model` removes one, since it belongs to
    the weights that it was measured with.

    Args:
        folder: where the dictionary is saved.
        feature_density: share of tokens at which each atom has a nonzero coefficient.

    Returns:
        Path of the file; its one tensor "sparsity" is `log10(feature_density + 1e-10)`. Its header names
        the weights by the digests in `cfg.json`.

    Raises:
        ValueError: densities are not between 0 and 1, or not those of the atoms of that dictionary.
        OSError: the file cannot be written.
    """
    if not ((feature_density >= 0) & (feature_density <= 1)).all():
        raise ValueError("feature_density must be between 0 and 1 for every atom")
    path = Path(folder) / SPARSITY_FILENAME
    n_atoms = _config_of(path.parent).get("d_sae", len(feature_density))
    if len(feature_density) != n_atoms:
        raise ValueError(
            f"feature_density must have d_sae={n_atoms} numbers, got {len(feature_density)}"
        )
    with replacing(path) as (temporary,):
        logarithms = torch.log10(feature_density.cpu().float() + EPSILON)
        weights = _weights_of(path.parent)
        write_tensors(
            {"sparsity": logarithms}, temporary, None if weights is None else {WEIGHTS_KEY: weights}
        )
    return path


def _weights_of(folder: Path) -> str | None:
    """The digests of the weights beside, as text; None where the configuration has none."""
    metadata = _config_of(folder).get("metadata")
    recorded = metadata.get(WEIGHTS_KEY) if isinstance(metadata, dict) else None
    return None if recorded is None else json.dumps(recorded, sort_keys=True)


def _config_of(folder: Path) -> dict[str, Any]:
    """The configuration beside; an empty one where there is none that can be read."""
    try:
        config = json.loads((folder / SAE_CFG_FILENAME).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
