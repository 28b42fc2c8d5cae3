"""From a model and texts to dictionaries, one for each hook point, in a single pass."""

import hashlib
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from itda_lens.dictionary import Dictionary, Label, Selector
from itda_lens.pursuit import DEFAULT_RTOL, Method
from itda_lens.sae import ITDA
from itda_lens.sources import (
    ContextBatch,
    LanguageModel,
    Loader,
    describe_texts,
    hook_is_per_head,
    iterate_texts,
    language_model,
)
from itda_lens.training.presets import Preset, Recipe
from itda_lens.training.record import BUILD_KEY, versions
from itda_lens.training.stream import stream_activations, tokenization_for

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_FVU = 5.0
"""The progress bar measures its FVU no more often: each is a small pursuit for every hook."""


FINGERPRINT_TEXTS = 8
"""Texts, the first ones, whose hash tells texts apart. How many are read depends on the settings."""


def build(
    model: Any,
    texts: str | Path | Iterable[str],
    hook_names: str | Sequence[str],
    *,
    d_sae: int | None,
    k: int,
    preset: Preset = "best",
    seed: int = 0,
    method: Method | None = None,
    signed: bool = True,
    loss_threshold: float | None = None,
    l0: float | None = None,
    update: bool = False,
    least_cosine: float | None = None,
    rtol: float = DEFAULT_RTOL,
    context_size: int = 128,
    prepend_bos: bool | None = None,
    keep_special_tokens: bool = False,
    batch_size: int = 16,
    max_tokens: int | None = None,
    text_field: str = "text",
    split: str = "train",
    tokenizer: Any = None,
    model_name: str | None = None,
    loader: Loader = "bridge",
    device: str | None = None,
    progress: bool = True,
) -> dict[str, ITDA]:
    """Build one labelled dictionary per hook point, all from the same forward passes.

    The passes stop at the deepest hook. Memory does not grow with the number of texts. The same
    arguments give the same dictionaries, bit for bit, on a CPU with the same number of threads.

    Args:
        model: a Hugging Face name or local folder, a HookedTransformer, a TransformerBridge or a
            Hugging Face model; see `itda_lens.sources.language_model`.
        texts: strings, a text or jsonl file, or the name of a `datasets` data set; see
            `itda_lens.sources.iterate_texts`.
        hook_names: one hook point or several, by TransformerLens's names.
        d_sae, k, preset, seed, method, signed, loss_threshold, l0, update, least_cosine, rtol:
            as in `fit`.
        context_size: tokens per context, the BOS token included; longer texts are cut.
        prepend_bos: begin each context with the BOS token; default: if the tokenizer has one.
        keep_special_tokens: let position 0 and special tokens count; padding never does.
        batch_size: contexts per forward pass.
        max_tokens: stop once so many tokens have counted; default: all of the texts.
        text_field, split: for jsonl files and data sets.
        tokenizer, model_name, loader, device: as in `language_model`.
        progress: show a progress bar with tokens/s, atoms and running FVU.

    Returns:
        The dictionaries by hook name, in the order of `hook_names`.

    Raises:
        ValueError: bad settings, no texts, all tokens masked, an unknown model or hook, a hook that
            never fires, NaN or infinite activations, or fewer distinct activations than d_sae.
        TypeError: a model or text of the wrong kind.
    """
    recipe = Recipe(
        d_sae, k, preset, seed, method, signed, loss_threshold,
        l0=l0, update=update, least_cosine=least_cosine, rtol=rtol,
    )  # fmt: skip
    names = [hook_names] if isinstance(hook_names, str) else list(hook_names)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"hook_names must be one or more different names, got {names}")
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if d_sae is not None and max_tokens is not None and d_sae > max_tokens:
        raise ValueError(f"d_sae={d_sae} atoms cannot be chosen among max_tokens={max_tokens}")
    # Looked at before the model is loaded, so that missing texts are told at once.
    stream = iterate_texts(texts, text_field=text_field, split=split)
    beginning = list(itertools.islice(stream, FINGERPRINT_TEXTS))
    if not beginning:
        raise ValueError("texts must hold at least one text, got none")
    stream = itertools.chain(beginning, stream)
    fingerprint = hashlib.sha256()
    for _ in _hashed(beginning, fingerprint):
        pass

    lm = language_model(model, tokenizer=tokenizer, name=model_name, loader=loader, device=device)
    lm.check_hooks(names)
    tokenization = tokenization_for(lm, context_size, prepend_bos, keep_special_tokens)

    read = hashlib.sha256()
    run = _Run(lm, names, recipe, max_tokens, progress)
    dictionaries = run.over(tokenization.batches(_hashed(stream, read), batch_size))

    source = {
        **describe_texts(texts, text_field, split),
        "texts_fingerprint": fingerprint.hexdigest(),
        "texts_read_sha256": read.hexdigest(),
        "vocabulary_sha256": tokenization.vocabulary_sha256(),
        "context_size": context_size,
        "prepend_bos": tokenization.prepend_bos,
        "keep_special_tokens": keep_special_tokens,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "n_tokens": run.n_tokens,
        "model": lm.source,
        "loader": lm.loader,
        "seconds": round(run.seconds, 2),
    }
    metadata = {
        "model_name": lm.name,
        "model_class_name": (
            "AutoModelForCausalLM" if lm.loader == "huggingface" else "HookedTransformer"
        ),
        "context_size": context_size,
        "prepend_bos": tokenization.prepend_bos,
        "dataset_path": str(texts) if isinstance(texts, str | Path) else None,
        BUILD_KEY: recipe.record() | source | versions(),
    }
    return {
        name: recipe.assemble(
            dictionary,
            metadata | {"hook_name": name},
            reshape_activations="hook_z" if hook_is_per_head(name) else "none",
        )
        for name, dictionary in dictionaries.items()
    }


class _Run:
    """One pass over the batches, feeding a selector per hook point."""

    def __init__(
        self, lm: LanguageModel, names: list[str], recipe: Recipe, max_tokens: int | None, progress: bool
    ) -> None:
        self._lm, self._names, self._recipe = lm, names, recipe
        self._max_tokens, self._progress = max_tokens, progress
        self._selectors: dict[str, Selector] = {}
        self.n_tokens = 0
        self.seconds = 0.0

    @torch.no_grad()
    def over(self, batches: Iterator[ContextBatch]) -> dict[str, Dictionary]:
        start = fvu_at = time.perf_counter()
        with tqdm(
            total=self._max_tokens,
            unit="tok",
            unit_scale=True,
            desc="building",
            disable=not self._progress,
        ) as bar:
            for labels, activations in stream_activations(
                self._lm, self._names, batches, self._max_tokens
            ):
                self._update(labels, activations)
                bar.update(len(labels))
                now = time.perf_counter()
                if self._progress and now - fvu_at > SECONDS_BETWEEN_FVU:
                    fvu_at = now
                    bar.set_postfix(self._status())
                if all(selector.done for selector in self._selectors.values()):
                    break
        dictionaries = {}
        for name, selector in self._selectors.items():
            dictionaries[name] = selector.finish(self._progress)
            logger.info("%s: %d atoms chosen", name, len(dictionaries[name].atoms))
        self.seconds = time.perf_counter() - start
        return dictionaries

    def _update(self, labels: Sequence[Label], activations: Mapping[str, Tensor]) -> None:
        for name, x in activations.items():
            if name not in self._selectors:
                self._selectors[name] = self._recipe.selector(x.shape[1], x.dtype, x.device)
            self._selectors[name].update(x, labels)
        self.n_tokens += len(labels)

    def _status(self) -> dict[str, str]:
        selectors = self._selectors.values()
        return {
            "atoms": "/".join(str(selector.n_atoms) for selector in selectors),
            "FVU": "/".join(f"{selector.running_fvu():.3f}" for selector in selectors),
        }


def _hashed(texts: Iterable[str], fingerprint: "hashlib._Hash") -> Iterator[str]:
    """Pass texts on, adding each to the fingerprint; lengths keep ["ab"] from being ["a", "b"]."""
    for text in texts:
        data = text.encode("utf-8", errors="surrogatepass")
        fingerprint.update(f"{len(data)}:".encode())
        fingerprint.update(data)
        yield text
