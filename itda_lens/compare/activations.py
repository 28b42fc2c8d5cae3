"""Activations of the models that dictionaries belong to, on texts that both sides read."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from itda_lens.records import Cutting, Provenance, agreed, checked
from itda_lens.sae import ITDA, hook_name_of, provenance_of
from itda_lens.sources import Activations, Chats, Loader, chat_context_size
from itda_lens.training import collect


@checked
def activations_of(
    itdas: Sequence[ITDA],
    texts: str | Path | Iterable[str] | Chats,
    model: Any = None,
    *,
    max_tokens: int | None = 20_000,
    batch_size: int = 16,
    text_field: str = "text",
    split: str = "train",
    tokenizer: Any = None,
    loader: Loader | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> list[Activations]:
    """Activations of one model at the hook points of its dictionaries, texts cut as for their build.

    `Chats` are read by the model's chat template, whatever the dictionaries were built from.

    Args:
        itdas: dictionaries of one model.
        model: as in `build`; default: the one that the dictionaries name, loaded as they say.
        max_tokens: the most tokens to read; memory is d_in * 4 bytes for each token and dictionary.
        texts, batch_size, text_field, split, tokenizer, loader, device, progress: as in `build`.

    Returns:
        The activations for each dictionary, in their order. All are of the same tokens.

    Raises:
        ValueError: there are no dictionaries; one names no hook point; they name several models or
            different ways to cut texts; or as `build`.
    """
    settings = recorded_settings(itdas, model)
    cutting: dict[str, Any] = asdict(settings.cutting)
    if isinstance(texts, Chats):
        cutting = {"context_size": chat_context_size([provenance_of(itda) for itda in itdas])}
    hooks = [hook_name_of(itda) for itda in itdas]
    found = collect(
        settings.model if model is None else model,
        texts,
        list(dict.fromkeys(hooks)),
        max_tokens=max_tokens,
        **cutting,
        batch_size=batch_size,
        text_field=text_field,
        split=split,
        tokenizer=tokenizer,
        loader=loader or settings.loader or "bridge",  # pyright: ignore[reportArgumentType]
        device=device,
        progress=progress,
    )
    return [found[hook] for hook in hooks]


@checked
def recorded_settings(itdas: Sequence[ITDA], model: Any = None) -> Provenance:
    """The model, and how its texts were cut, as the dictionaries record it.

    Args:
        model: a model to use instead of the one that the dictionaries name.

    Raises:
        ValueError: there are no dictionaries; one names no hook point or no model; or they disagree.
    """
    if not itdas:
        raise ValueError("itdas must be one dictionary or more, got none")
    for itda in itdas:
        hook_name_of(itda)
    names = ["loader", *(f.name for f in fields(Cutting))]
    if model is None:
        names.append("model")
    settings = agreed([provenance_of(itda) for itda in itdas], *names)
    if model is None and settings.model is None:
        raise ValueError(
            "the dictionaries name no model that could be loaded (they were built from one in memory or "
            "from a folder of another machine); from Python, pass model= to activations_of"
        )
    return settings
