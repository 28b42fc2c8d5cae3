"""From a model and texts to dictionaries, one for each hook point, in a single pass."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from itda_lens.dictionary import Rule
from itda_lens.pursuit import DEFAULT_RTOL, Method
from itda_lens.records import Cutting, TokenFilter, at_least, checked
from itda_lens.sae import ITDA, provenance_of
from itda_lens.sources import Activations, Chats, Loader, gathered, text_or_chat_source
from itda_lens.training.recipe import Preset, recipe_of
from itda_lens.training.run import build_from, check_enough
from itda_lens.training.shards import plan_texts

_DEFAULT = Cutting()


@checked
def build(
    model: Any,
    texts: str | Path | Iterable[str] | Chats,
    hook_names: str | Sequence[str],
    *,
    d_sae: int | None,
    k: int,
    preset: Preset = "best",
    rule: str | Rule | None = None,
    seed: int = 0,
    method: Method | None = None,
    signed: bool = True,
    loss_threshold: float | None = None,
    l0: float | None = None,
    update: bool = False,
    least_cosine: float | None = None,
    rtol: float = DEFAULT_RTOL,
    context_size: int | None = None,
    prepend_bos: bool | None = _DEFAULT.prepend_bos,
    keep_special_tokens: bool = _DEFAULT.keep_special_tokens,
    tokens: TokenFilter | None = None,
    batch_size: int = 16,
    max_tokens: int | None = None,
    text_field: str = "text",
    split: str = "train",
    tokenizer: Any = None,
    model_name: str | None = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> dict[str, ITDA]:
    """Build one labelled dictionary per hook point, all from the same forward passes.

    The passes stop at the deepest hook. Memory does not grow with the number of texts. The same
    arguments give the same dictionaries, bit for bit, on a CPU with the same number of threads.

    Args:
        model: a Hugging Face name or local folder, a HookedTransformer, a TransformerBridge or a
            Hugging Face model; see `itda_lens.sources.language_model`.
        texts: strings, a text or jsonl file, or the name of a `datasets` data set; see
            `itda_lens.sources.iterate_texts`. Or `Chats`: conversations, each read alone in the form of
            the model's chat template.
        hook_names: one hook point or several, by TransformerLens's names.
        d_sae, k, preset, rule, seed, method, signed, loss_threshold, l0, update, least_cosine, rtol:
            as in `fit`.
        context_size: tokens per context, the BOS token included; longer texts are cut. Default: 128.
            Of a longer conversation the rest is left out; default there: 2,048, or all that the model
            has positions for, if these are fewer.
        prepend_bos: begin each context with the BOS token; default: if the tokenizer has one.
        keep_special_tokens: let position 0 and special tokens count; padding never does. For `Chats`,
            neither this nor `prepend_bos` may be given.
        tokens: more conditions on the tokens that count, such as `TokenFilter(drop=r"\\d+")`.
        batch_size: contexts per forward pass.
        max_tokens: stop once this number of tokens has counted; default: all of the texts.
        text_field, split: for jsonl files and data sets.
        tokenizer, model_name, loader, device: as in `language_model`.
        folder: a folder that keeps finished parts of the work, so that a second call goes on where the
            first one stopped; see `plan`. The dictionaries are those of a call without it.
        progress: show a progress bar with tokens/s, atoms and running FVU.

    Returns:
        The dictionaries by hook name, in the order of `hook_names`.

    Raises:
        ValueError: bad settings, no texts, all tokens masked, an unknown model or hook, a hook that
            never fires, NaN or infinite activations, or fewer distinct activations than d_sae.
        TypeError: a model or text of the wrong kind.
    """
    recipe = recipe_of(
        d_sae=d_sae, k=k, preset=preset, rule=rule, seed=seed, method=method, signed=signed,
        loss_threshold=loss_threshold, l0=l0, update=update, least_cosine=least_cosine, rtol=rtol,
    )  # fmt: skip
    at_least(1, max_tokens=max_tokens)
    check_enough(recipe, max_tokens)
    reading: dict[str, Any] = dict(
        tokens=tokens,
        batch_size=batch_size, max_tokens=max_tokens, text_field=text_field, split=split,
        tokenizer=tokenizer, model_name=model_name, loader=loader, device=device,
    )  # fmt: skip
    if folder is not None:
        cutting = Cutting.given(context_size, prepend_bos, keep_special_tokens)
        made = plan_texts(model, texts, hook_names, recipe, cutting, folder=folder, **reading)
        made.run_all(progress=progress)
        return made.finish(progress=progress)
    source = text_or_chat_source(
        model, texts, hook_names, context_size, prepend_bos, keep_special_tokens, **reading
    )
    start = time.perf_counter()
    dictionaries = build_from(source, recipe, progress=progress)
    seconds = round(time.perf_counter() - start, 2)
    for itda in dictionaries.values():
        replace(provenance_of(itda), seconds=seconds).into(itda.cfg.metadata)
    return dictionaries


@checked
def collect(
    model: Any,
    texts: str | Path | Iterable[str] | Chats,
    hook_names: str | Sequence[str],
    *,
    max_tokens: int | None = None,
    context_size: int | None = None,
    prepend_bos: bool | None = _DEFAULT.prepend_bos,
    keep_special_tokens: bool = _DEFAULT.keep_special_tokens,
    tokens: TokenFilter | None = None,
    batch_size: int = 16,
    text_field: str = "text",
    split: str = "train",
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> dict[str, Activations]:
    """The activations that `build` would look at, held in memory, for `fit` and for baselines.

    Args:
        max_tokens: the most tokens to read; default: all. Memory is d_in * 4 bytes for each token and
            hook point.
        model, texts, hook_names, and the other arguments: as in `build`.

    Raises:
        ValueError, TypeError: as `build`.
    """
    source = text_or_chat_source(
        model, texts, hook_names, context_size, prepend_bos, keep_special_tokens, tokens=tokens,
        batch_size=batch_size, max_tokens=max_tokens, text_field=text_field, split=split,
        tokenizer=tokenizer, loader=loader, device=device,
    )  # fmt: skip
    return gathered(source, progress)
