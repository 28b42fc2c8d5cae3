"""The activations of a language model on texts."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from itda_lens.records import Cutting, Provenance, TokenFilter, at_least, checked
from itda_lens.sources.contexts import ContextBatch, Tokenization
from itda_lens.sources.models import language_model
from itda_lens.sources.naming import saelens_class
from itda_lens.sources.readable import Loader, ReadableModel
from itda_lens.sources.source import Listing, Rows
from itda_lens.sources.texts import describe_texts, iterate_texts

FINGERPRINT_TEXTS = 8
"""Number of texts, from the first on, whose hash tells texts apart. It is fixed, since the number of
texts that are read depends on the settings."""


_START = {"row": 0, "chunk": 0, "n": 0}
"""The mark of the first batch."""


class ModelSource:
    """The activations of the tokens that count, from forward passes that stop at the deepest hook.

    Memory does not grow with the number of texts. Everything that can be checked is checked on
    construction: the texts first, before a model is loaded.

    Args:
        model: a Hugging Face name or local folder, or a loaded model; see `language_model`.
        texts: strings, a text or jsonl file, or the name of a data set; see `iterate_texts`. Those of an
            iterator can be read once.
        hook_names: one hook point or several, by the names that the model knows.
        cutting: how texts are cut into contexts, and which tokens count.
        tokens: more conditions on the tokens that count.
        batch_size: contexts per forward pass.
        max_tokens: end after exactly this number of tokens that count; default: after all texts.
        text_field, split: for jsonl files and data sets.
        tokenizer, model_name, loader, device: as in `language_model`.

    Raises:
        ValueError: a setting is out of range, no texts, an unknown model or hook.
        TypeError: a model, text or hook name of the wrong kind.
    """

    @checked
    def __init__(
        self,
        model: Any,
        texts: str | Path | Iterable[str],
        hook_names: str | Sequence[str],
        cutting: Cutting = Cutting(),  # noqa: B008 (immutable)
        *,
        tokens: TokenFilter | None = None,
        batch_size: int = 16,
        max_tokens: int | None = None,
        text_field: str = "text",
        split: str = "train",
        tokenizer: Any = None,
        model_name: str | None = None,
        loader: Loader = "bridge",
        device: str | torch.device | None = None,
    ) -> None:
        self.hooks = hook_list(hook_names)
        at_least(1, batch_size=batch_size, max_tokens=max_tokens)
        self.n_rows = max_tokens
        self._texts, self._text_field, self._split = texts, text_field, split
        self._batch_size = batch_size
        # Looked at before the model is loaded, so that missing texts are told at once.
        self._stream: Iterator[str] | None = self._opened()
        self._beginning = list(itertools.islice(self._stream, FINGERPRINT_TEXTS))
        if not self._beginning:
            raise ValueError("texts must hold at least one text, got none")
        self.model: ReadableModel = language_model(
            model, tokenizer=tokenizer, name=model_name, loader=loader, device=device
        )
        self.model.check_hooks(self.hooks)
        self.tokenization = tokenization_for(self.model, cutting, tokens)
        self._n_tokens: int | None = None
        self._read: str | None = None

    def rows(self, skip: int = 0) -> Iterator[Rows]:
        """The rows of each forward pass; see `ActivationSource.rows`."""
        return self._captured(_START, skip)

    def rows_from(self, mark: Mapping[str, int]) -> Iterator[Rows]:
        """The rows from a batch of `listing` on. Texts before it are passed over unread."""
        return self._captured(mark, mark["n"])

    def listing(self) -> Iterator[Listing]:
        """The places of each forward pass, from the tokenizer alone; see `Listed.listing`."""
        for mark, batch in self._batches(_START, 0):
            if batch.keep.any():
                yield Listing(batch.places(), mark)

    @torch.no_grad()
    def _captured(self, mark: Mapping[str, int], skip: int) -> Iterator[Rows]:
        for _, batch in self._batches(mark, skip):
            if batch.keep.any():
                found = self.model.capture(batch.tokens, batch.attention_mask, list(self.hooks))
                keep = batch.keep
                yield Rows.of(batch.places(), {name: x[keep.to(x.device)] for name, x in found.items()})

    def _batches(
        self, mark: Mapping[str, int], skip: int
    ) -> Iterator[tuple[dict[str, int], ContextBatch]]:
        """Batches of contexts, and the mark of each, in which the rows that were asked for count.

        Args:
            mark: of the first batch: the number and the context of the text with which it begins, and
                the rows before it.
            skip: the number of rows, from the start of the source, that do not count.
        """
        if self._stream is None:  # read before
            self._stream = self._opened()
            self._beginning = list(itertools.islice(self._stream, FINGERPRINT_TEXTS))
        texts, self._stream = itertools.chain(self._beginning, self._stream), None
        read = hashlib.sha256()
        n, whole = mark["n"], mark == _START
        batches = self.tokenization.batches(
            _hashed(itertools.islice(texts, mark["row"], None), read),
            self._batch_size,
            first_row=mark["row"],
            first_chunk=mark["chunk"],
        )
        for batch in batches:
            first = batch.contexts[0]
            here = {"row": first.row, "chunk": first.chunk, "n": n}
            ahead = batch.keep.flatten().cumsum(dim=0).reshape(batch.keep.shape) + n
            keep = batch.keep & (ahead > skip)
            if self.n_rows is not None:
                keep &= ahead <= self.n_rows
            n = min(int(ahead.max()), self.n_rows or int(ahead.max()))
            if whole:  # whoever reads may stop here
                self._n_tokens, self._read = n, read.hexdigest()
            yield here, dataclasses.replace(batch, keep=keep)
            if n == self.n_rows:
                break
        if whole:
            self._n_tokens, self._read = n, read.hexdigest()
        if n == 0:
            raise ValueError(
                "texts gave no token that counts: all were masked (BOS, padding, special tokens), or "
                "the texts are empty"
            )

    def provenance(self, hook: str) -> Provenance:
        """The model, the texts and how they were cut; after reading, also how much was read."""
        lm, cutting = self.model, self.tokenization.cutting
        described = describe_texts(self._texts, self._text_field, self._split)
        return Provenance(
            model_name=lm.name,
            model_class_name=saelens_class(lm.loader, hook),
            hook_name=hook,
            model=lm.source,
            loader=lm.loader,
            context_size=cutting.context_size,
            prepend_bos=self.tokenization.prepend_bos,
            keep_special_tokens=cutting.keep_special_tokens,
            dataset_path=described["texts"] if isinstance(self._texts, str | Path) else None,
            texts=described["texts"],
            text_field=described.get("text_field"),
            split=described.get("split"),
            texts_fingerprint=texts_fingerprint(self._beginning),
            texts_read_sha256=self._read,
            vocabulary_sha256=self.tokenization.vocabulary_sha256(),
            batch_size=self._batch_size,
            max_tokens=self.n_rows,
            n_tokens=self._n_tokens,
            tokens={} if (tokens := self.tokenization.tokens) is None else tokens.record(),
        )

    def _opened(self) -> Iterator[str]:
        return iterate_texts(self._texts, text_field=self._text_field, split=self._split)


def texts_fingerprint(texts: Iterable[str]) -> str:
    """A digest of the first texts, `FINGERPRINT_TEXTS` at most."""
    digest = hashlib.sha256()
    for _ in _hashed(itertools.islice(texts, FINGERPRINT_TEXTS), digest):
        pass
    return digest.hexdigest()


def hook_list(hook_names: str | Sequence[str]) -> list[str]:
    """One name or several as a list.

    Raises:
        TypeError: not a string, nor a sequence of them.
        ValueError: there is none, or one stands there twice.
    """
    names = [hook_names] if isinstance(hook_names, str) else hook_names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"hook_names must be a hook name or a list of them, got {hook_names!r}")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"hook_names must be one or more different names, got {list(names)}")
    return list(names)


@checked
def tokenization_for(
    lm: ReadableModel, cutting: Cutting, tokens: TokenFilter | None = None
) -> Tokenization:
    """How to cut texts into contexts for a model.

    Raises:
        ValueError: contexts are longer than the model's, or begin with a BOS token that it has not;
            or `tokens` asks for roles, which texts have none of.
    """
    check_context_size(lm, cutting.context_size)
    return Tokenization(lm.tokenizer, cutting, tokens)


def check_context_size(lm: ReadableModel, context_size: int) -> None:
    """Refuse contexts that are longer than a model's.

    Raises:
        ValueError: they are.
    """
    if lm.max_context is not None and context_size > lm.max_context:
        raise ValueError(
            f"context_size must be at most the model's {lm.max_context} tokens, got {context_size}"
        )


def _hashed(texts: Iterable[str], digest: "hashlib._Hash") -> Iterator[str]:
    """Pass texts on, adding each to the digest; lengths keep ["ab"] from being ["a", "b"]."""
    for text in texts:
        data = text.encode("utf-8", errors="surrogatepass")
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
        yield text
