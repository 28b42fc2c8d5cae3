"""From a name, a folder or a model of a known library to a `ReadableModel`."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from itda_lens.records import checked, known_name
from itda_lens.sources.hooked import HookedModel
from itda_lens.sources.hugging_face_models import HuggingFaceModel
from itda_lens.sources.readable import Loader, ReadableModel
from itda_lens.sources.transformer_lens_models import TransformerLensModel

LIBRARIES: dict[type[HookedModel], tuple[Loader, ...]] = {
    TransformerLensModel: ("bridge", "hooked_transformer"),
    HuggingFaceModel: ("huggingface",),
}
"""A class for each library, with the words for `loader` by which it loads a name."""


@checked
def language_model(
    model: Any,
    *,
    tokenizer: Any = None,
    name: str | None = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    source: str | None = None,
) -> ReadableModel:
    """Wrap a model, or load one by its name.

    Args:
        model: a Hugging Face name or local folder, a HookedTransformer, a TransformerBridge, a Hugging
            Face model, or a ReadableModel, which is returned as it is.
        tokenizer: a tokenizer, or the name or folder of one; needed only if the model neither brings nor
            names its own.
        name: the model's name in metadata; default: its own name. A local folder goes by its last part,
            since tools put the name into paths.
        loader: how to load a name: "bridge" (TransformerLens's TransformerBridge), "hooked_transformer"
            (`from_pretrained_no_processing`) or "huggingface".
        device: where to load a name to; default: the loader's choice (a GPU if there is one).
        dtype: in which precision to load a name.
        source: the origin that metadata should record for a loaded model; default: the one that the
            model names.

    Raises:
        ValueError: there is no such model, tokenizer or device, or the tokenizer is not known.
        TypeError: `model` or `tokenizer` is of none of these kinds.
    """
    device = None if device is None else str(device)
    _check_device(device)
    if not isinstance(tokenizer, str | Path):
        _check_tokenizer(tokenizer)
    if isinstance(model, ReadableModel):
        return model
    if isinstance(tokenizer, str | Path):
        tokenizer = _tokenizer(str(tokenizer))
    if isinstance(model, str | Path):
        folder = str(model)
        name, source = name or _plain_name(folder), folder
        model = _load(folder, tokenizer, loader, device, dtype)
    for library in LIBRARIES:
        kind = library.loader_of(model)
        if kind is not None:
            break
    else:
        raise TypeError(
            "model must be a name, a folder, a HookedTransformer, a TransformerBridge, a Hugging Face "
            f"model or a ReadableModel, got {type(model).__name__}"
        )
    own_name, own_tokenizer = library.described(model)
    if tokenizer is None:
        tokenizer = own_tokenizer
    if tokenizer is None:
        if not own_name:
            raise ValueError("tokenizer must be given: the model has none and does not name one")
        tokenizer = _tokenizer(own_name)
    return library(
        model, tokenizer, name or _plain_name(own_name or ""), kind, _source(own_name, source)
    )


def _load(
    name: str, tokenizer: Any, loader: Loader, device: str | None, dtype: torch.dtype
) -> torch.nn.Module:
    by_loader = {known: library for library, loaders in LIBRARIES.items() for known in loaders}
    if loader not in by_loader:
        raise ValueError(f"loader must be one of {', '.join(by_loader)}, got {loader!r}")
    library = by_loader[loader]
    try:
        return library.load(name, loader, tokenizer, device, dtype).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        if Path(name).is_dir():
            raise ValueError(f"the model in folder {name!r} cannot be loaded: {reason}") from error
        raise ValueError(
            f"model {name!r} is neither a folder nor a model that loader {loader!r} can load: {reason}"
        ) from error


def _check_device(device: str | None) -> None:
    if device is None:
        return
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device {device!r} is not one that PyTorch has here: {reason}") from error


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "get_vocab")):
        raise TypeError(
            "tokenizer must be a Hugging Face tokenizer, or the name or folder of one, got "
            f"{type(tokenizer).__name__}"
        )


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer could be loaded for {name!r}; pass tokenizer=") from error


def _source(own_name: str | None, source: str | None) -> str | None:
    """An absolute folder, a name as the hub has it, or None."""
    name = source or own_name
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name or None


def _plain_name(name: str) -> str:
    return known_name(os.path.abspath(name) if Path(name).is_dir() else name)
