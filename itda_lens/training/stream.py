"""The activations of the tokens that count, with their labels: as a stream, or collected."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from itda_lens.dictionary import Label
from itda_lens.pursuit import first_nonfinite_row
from itda_lens.sources import (
    ContextBatch,
    LanguageModel,
    Loader,
    Tokenization,
    iterate_texts,
    language_model,
)


class Activations(NamedTuple):
    """Activations at one hook point.

    Attributes:
        values: one activation a row, at least float32, on the model's device.
        labels: where each row came from.
    """

    values: Float[Tensor, "n_tokens d_in"]
    labels: list[Label]


def collect(
    model: Any,
    texts: str | Path | Iterable[str],
    hook_names: Sequence[str],
    *,
    max_tokens: int | None = None,
    context_size: int = 128,
    prepend_bos: bool | None = None,
    keep_special_tokens: bool = False,
    batch_size: int = 16,
    text_field: str = "text",
    split: str = "train",
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Activations]:
    """The activations that `build` would look at, held in memory, for `fit` and for baselines.

    Args:
        max_tokens: how many, default all; memory is d_in * 4 bytes for each and per hook point.
        model, texts, hook_names, and the other arguments: as in `build`.

    Raises:
        ValueError, TypeError: as `build`.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
    lm.check_hooks(list(hook_names))
    tokenization = tokenization_for(lm, context_size, prepend_bos, keep_special_tokens)
    batches = tokenization.batches(iterate_texts(texts, text_field=text_field, split=split), batch_size)
    values: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    labels: list[Label] = []
    with tqdm(
        total=max_tokens, unit="tok", unit_scale=True, desc="collecting", disable=not progress
    ) as bar:
        for found, activations in stream_activations(lm, list(hook_names), batches, max_tokens):
            labels += found
            for name, x in activations.items():
                values[name].append(x)
            bar.update(len(found))
    return {name: Activations(torch.cat(rows), labels) for name, rows in values.items()}


def tokenization_for(
    lm: LanguageModel, context_size: int, prepend_bos: bool | None, keep_special_tokens: bool
) -> Tokenization:
    """How to cut texts into contexts for a model; it starts them with BOS by default if it has one.

    Raises:
        ValueError: a setting is out of range, or contexts are longer than the model's.
    """
    if prepend_bos is None:
        prepend_bos = lm.tokenizer.bos_token_id is not None
    if lm.max_context is not None and context_size > lm.max_context:
        raise ValueError(
            f"context_size must be at most the model's {lm.max_context} tokens, got {context_size}"
        )
    return Tokenization(lm.tokenizer, context_size, prepend_bos, keep_special_tokens)


@torch.no_grad()
def stream_activations(
    lm: LanguageModel,
    hook_names: list[str],
    batches: Iterable[ContextBatch],
    max_tokens: int | None = None,
) -> Iterator[tuple[Sequence[Label], dict[str, Float[Tensor, "n width"]]]]:
    """Labels and activations, at least float32, of the tokens that count, batch by batch.

    Args:
        max_tokens: end after exactly so many tokens; the last batch is cut.

    Raises:
        ValueError: no token counts, or an activation is NaN or infinite.
    """
    n_tokens = 0
    for batch in batches:
        keep = batch.keep
        if max_tokens is not None:
            ahead = keep.flatten().cumsum(dim=0).reshape(keep.shape)
            keep = keep & (ahead <= max_tokens - n_tokens)
            batch = dataclasses.replace(batch, keep=keep)
        n = int(keep.sum())
        if n == 0:
            continue
        n_tokens += n
        labels = batch.labels()
        activations = {}
        for name, activation in lm.capture(batch.tokens, batch.attention_mask, hook_names).items():
            x = activation[keep.to(activation.device)]
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            bad = first_nonfinite_row(x)
            if bad is not None:
                raise ValueError(f"NaN or infinite activation at {name!r}, {labels[bad]}")
            activations[name] = x
        yield labels, activations
        if n_tokens == max_tokens:
            return
    if n_tokens == 0:
        raise ValueError(
            "texts gave no token that counts: all were masked (BOS, padding, special tokens), or the "
            "texts are empty"
        )
