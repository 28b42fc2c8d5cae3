"""Activations of the models that dictionaries belong to, on texts that both sides read."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from itda_lens.sae import ITDA
from itda_lens.sources import Loader
from itda_lens.training import Activations, build_record, collect, hook_name_of


def activations_of(
    itdas: Sequence[ITDA],
    texts: str | Path | Iterable[str],
    model: Any = None,
    *,
    max_tokens: int | None = 20_000,
    batch_size: int = 16,
    text_field: str = "text",
    split: str = "train",
    tokenizer: Any = None,
    loader: Loader | None = None,
    device: str | None = None,
    progress: bool = True,
) -> list[Activations]:
    """Activations of one model at the hook points of its dictionaries, texts cut as for their build.

    Args:
        itdas: dictionaries of one model.
        model: as in `build`; default: the one that the dictionaries name, loaded as they say.
        max_tokens: how many, at most; memory is d_in * 4 bytes for each and per dictionary.
        texts, batch_size, text_field, split, tokenizer, loader, device, progress: as in `build`.

    Returns:
        One for each dictionary, in their order, all of the same tokens.

    Raises:
        ValueError: no dictionaries; ones that name no hook point, several models, or different ways to
            cut texts; or as `build`.
    """
    settings = recorded_settings(itdas, model)
    hooks = [hook_name_of(itda) for itda in itdas]
    found = collect(
        settings["model"],
        texts,
        list(dict.fromkeys(hooks)),
        max_tokens=max_tokens,
        context_size=settings["context_size"] or 128,
        prepend_bos=settings["prepend_bos"],
        keep_special_tokens=bool(settings["keep_special_tokens"]),
        batch_size=batch_size,
        text_field=text_field,
        split=split,
        tokenizer=tokenizer,
        loader=loader or settings["loader"] or "bridge",
        device=device,
        progress=progress,
    )
    return [found[hook] for hook in hooks]


def recorded_settings(itdas: Sequence[ITDA], model: Any = None) -> dict[str, Any]:
    """The model, and how its texts were cut, as the dictionaries record it; None for what they do not.

    Args:
        model: instead of the one that they name.

    Raises:
        ValueError: no dictionaries; ones that name no hook point or no model, or that disagree.
    """
    if not itdas:
        raise ValueError("itdas must be one dictionary or more, got none")
    for itda in itdas:
        hook_name_of(itda)
    records = [build_record(itda) for itda in itdas]
    settings = {}
    for name in ("model", "loader", "context_size", "prepend_bos", "keep_special_tokens"):
        values = {record[name] for record in records if record.get(name) is not None}
        if len(values) > 1 and not (name == "model" and model is not None):
            raise ValueError(f"dictionaries of one model must agree in {name}, got {sorted(values)}")
        settings[name] = values.pop() if values else None
    if model is not None:
        settings["model"] = model
    if settings["model"] is None:
        raise ValueError(
            "the dictionaries name no model that could be loaded (they were built from one in memory); "
            "from Python, pass model= to activations_of"
        )
    return settings
