"""Atoms under the ids and field names of Neuronpedia's feature records."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from itda_lens.records import HookPoint, Label, replacing
from itda_lens.sae import ITDA


def neuronpedia_id(itda: ITDA, source_set: str = "itda") -> str:
    """The id "MODEL/SOURCE" of a dictionary: the metadata's `neuronpedia_id` where it is set.

    Otherwise the id is made as Neuronpedia makes them, such as "gpt2/6-res-itda"; no page of that name
    need exist. SAELens's links to Neuronpedia take `itda.cfg.metadata.neuronpedia_id`.

    Raises:
        ValueError: the metadata names no model or no hook point with a layer.
    """
    metadata = itda.cfg.metadata
    if metadata.neuronpedia_id:
        return metadata.neuronpedia_id
    hook_name = metadata.hook_name or ""
    layer = HookPoint.parse(hook_name).layer
    if not metadata.model_name or layer is None:
        raise ValueError(
            f"a Neuronpedia id needs model_name and hook_name in the metadata, got "
            f"{metadata.model_name!r} and {metadata.hook_name!r}"
        )
    kinds = {"resid": "res", "mlp": "mlp", "attn": "att", "hook_z": "att"}
    kind = next((short for part, short in kinds.items() if part in hook_name), None)
    model = Path(metadata.model_name).name.lower()
    return f"{model}/{'-'.join(part for part in (str(layer), kind, source_set) if part)}"


def neuronpedia_features(
    itda: ITDA, feature_density: Float[Tensor, " d_sae"] | None = None, source_set: str = "itda"
) -> Iterator[dict[str, Any]]:
    """One record an atom: modelId, layer, index, frac_nonzero, and its label as the explanation.

    Neuronpedia's own records also hold activations and logits; these records do not.

    Args:
        feature_density: share of tokens at which each atom fires; `frac_nonzero` is None without it.
        source_set: last part of the source's id where the metadata has no `neuronpedia_id`.

    Raises:
        ValueError: no labels, or metadata that name no model or layer.
    """
    model, _, source = neuronpedia_id(itda, source_set).partition("/")
    for index, label in enumerate(itda.labels):
        yield {
            "modelId": model,
            "layer": source,
            "index": str(index),
            "frac_nonzero": None if feature_density is None else float(feature_density[index]),
            "explanations": [{"description": _description(label), "typeName": "itda-label"}],
        }


def _description(label: Label) -> str:
    said = label.context or str(label)
    return f"minus: {said}" if label.cosine < 0 else said


def save_neuronpedia_features(
    itda: ITDA, path: str | Path, feature_density: Float[Tensor, " d_sae"] | None = None
) -> Path:
    """Write `neuronpedia_features` as JSON lines, whole or not at all.

    Raises:
        ValueError: as `neuronpedia_features`.
        OSError: the file cannot be written.
    """
    lines = [json.dumps(record) for record in neuronpedia_features(itda, feature_density)]
    path = Path(path)
    with replacing(path) as (temporary,):
        temporary.write_text("\n".join(lines) + "\n")
    return path
