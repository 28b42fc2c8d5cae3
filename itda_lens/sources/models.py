"""From a name, a folder or a model of several libraries to a `LanguageModel`."""

from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError

from itda_lens.sources.hooks import LanguageModel, Loader


def language_model(
    model: Any,
    *,
    tokenizer: Any = None,
    name: str | None = None,
    loader: Loader = "bridge",
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    source: str | None = None,
) -> LanguageModel:
    """Wrap a model, or load one by its name.

    Args:
        model: a Hugging Face name or local folder, a HookedTransformer, a TransformerBridge, a Hugging
            Face causal language model, or a LanguageModel, which is returned as it is.
        tokenizer: needed only where the model does not bring or name its own.
        name: what metadata should call the model; default: its own name. A local folder goes by its last
            part, since tools put the name into paths.
        loader: how to load a name: "bridge" (TransformerLens's TransformerBridge), "hooked_transformer"
            (`from_pretrained_no_processing`) or "huggingface".
        device: where to load a name to; default: the loader's choice (a GPU if there is one).
        dtype: in which precision to load a name.
        source: what metadata should say that a loaded model came from; default: what it says itself.

    Raises:
        ValueError: there is no such model or device, or the tokenizer is not known.
        TypeError: `model` is of none of these kinds.
    """
    if isinstance(model, LanguageModel):
        return model
    if isinstance(model, str | Path):
        return _load(str(model), tokenizer, name, loader, device, dtype)
    kind = _kind_of(model)
    own_name = model.name_or_path if kind == "huggingface" else model.cfg.model_name
    if tokenizer is None and kind != "huggingface":
        tokenizer = model.tokenizer
    if tokenizer is None:
        if not own_name:
            raise ValueError("tokenizer must be given: the model has none and does not name one")
        tokenizer = _tokenizer(own_name)
    return LanguageModel(
        model, tokenizer, name or _plain_name(own_name), kind, _source(own_name, source)
    )


def _load(
    model: str, tokenizer: Any, name: str | None, loader: Loader, device: str | None, dtype: torch.dtype
) -> LanguageModel:
    if loader not in get_args(Loader):
        raise ValueError(f"loader must be one of {get_args(Loader)}, got {loader!r}")
    _check_device(device)
    try:
        if loader == "bridge":
            from transformer_lens.model_bridge import TransformerBridge

            loaded = TransformerBridge.boot_transformers(
                model, device=device, dtype=dtype, tokenizer=tokenizer
            )
        elif loader == "hooked_transformer":
            from transformer_lens import HookedTransformer

            loaded = HookedTransformer.from_pretrained_no_processing(
                model, device=device, dtype=dtype, tokenizer=tokenizer
            )
        else:
            from transformers import AutoModelForCausalLM

            loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
            loaded = loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        if Path(model).is_dir():
            raise ValueError(f"the model in folder {model!r} cannot be loaded: {reason}") from error
        raise ValueError(
            f"model {model!r} is neither a folder nor a model that loader {loader!r} can load: {reason}"
        ) from error
    return language_model(
        loaded.eval(), tokenizer=tokenizer, name=name or _plain_name(model), source=model
    )


def _check_device(device: str | None) -> None:
    if device is None:
        return
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device {device!r} is not one that PyTorch has here: {reason}") from error


def _kind_of(model: Any) -> Loader:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

    if isinstance(model, TransformerBridge):
        return "bridge"
    if isinstance(model, HookedTransformer):
        return "hooked_transformer"
    if isinstance(model, PreTrainedModel):
        return "huggingface"
    raise TypeError(
        "model must be a name, a folder, a HookedTransformer, a TransformerBridge or a Hugging Face "
        f"model, got {type(model).__name__}"
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
    return Path(name).name if Path(name).is_dir() else name
