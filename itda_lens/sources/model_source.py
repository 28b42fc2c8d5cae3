"""The activations of a language model on texts."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.records import Cutting, Places, Provenance, TokenFilter, at_least, checked
from itda_lens.sources.contexts import ContextBatch, Tokenization
from itda_lens.sources.hooked import HookedModel
from itda_lens.sources.hooks import expanded
from itda_lens.sources.models import language_model
from itda_lens.sources.naming import saelens_class
from itda_lens.sources.readable import Loader, ReadableModel
from itda_lens.sources.source import Listing, Rows
from itda_lens.sources.texts import Ids, describe_texts, iterate_texts

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
        texts: strings, a file or folder, or the name of a data set; see `iterate_texts`. Those of an
            iterator can be read once.
        hook_names: one hook point or several, by the names that the model knows. A "*" in a name stands
            for the number of each layer, and a whole number n for "blocks.n.hook_resid_post".
        cutting: how texts are cut into contexts, and which tokens count.
        tokens: more conditions on the tokens that count.
        batch_size: contexts per forward pass.
        max_tokens: end after exactly this number of tokens that count; default: after all texts.
        per_head: whether each attention head's part of a token is a row of its own, with the head in its
            label. For hooks that are split by head, such as "blocks.0.attn.hook_z". By default heads
            stand side by side in one row.
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
        texts: str | Path | Iterable[Any],
        hook_names: str | int | Sequence[str | int],
        cutting: Cutting = Cutting(),  # noqa: B008 (immutable)
        *,
        tokens: TokenFilter | None = None,
        batch_size: int = 16,
        max_tokens: int | None = None,
        per_head: bool = False,
        text_field: str = "text",
        split: str = "train",
        tokenizer: Any = None,
        model_name: str | None = None,
        loader: Loader = "bridge",
        device: str | torch.device | None = None,
    ) -> None:
        wanted = hook_list(hook_names)
        at_least(1, batch_size=batch_size, max_tokens=max_tokens)
        self._max_tokens = max_tokens
        self._texts, self._text_field, self._split = texts, text_field, split
        self._batch_size = batch_size
        # Looked at before the model is loaded, so that missing texts are told at once.
        self._stream: Iterator[str | Ids] | None = self._opened()
        self._beginning = list(itertools.islice(self._stream, FINGERPRINT_TEXTS))
        if not self._beginning:
            raise ValueError("texts must hold at least one text, got none")
        self.model: ReadableModel = language_model(
            model, tokenizer=tokenizer, name=model_name, loader=loader, device=device
        )
        self.hooks = hooks_of(self.model, wanted)
        self._n_heads = heads_at(self.model, self.hooks) if per_head else None
        self.n_rows = None if max_tokens is None else max_tokens * (self._n_heads or 1)
        self.tokenization = tokenization_for(self.model, cutting, tokens)
        self._n_tokens: int | None = None
        self._read: str | None = None

    def rows(self, skip: int = 0) -> Iterator[Rows]:
        """The rows of each forward pass; see `ActivationSource.rows`."""
        tokens, heads = divmod(skip, self._n_heads or 1)
        return self._captured(_START, tokens, heads)

    def rows_from(self, mark: Mapping[str, int]) -> Iterator[Rows]:
        """The rows from a batch of `listing` on. Texts before it are passed over unread."""
        return self._captured(mark, mark["n"])

    def listing(self) -> Iterator[Listing]:
        """The places of each forward pass, from the tokenizer alone; see `Listed.listing`."""
        for mark, batch in self._batches(_START, 0):
            if batch.keep.any():
                yield Listing(self._places(batch), mark)

    @torch.no_grad()
    def _captured(self, mark: Mapping[str, int], skip: int, heads: int = 0) -> Iterator[Rows]:
        """Rows from a mark on, without `skip` tokens and the first `heads` of the token after them."""
        for _, batch in self._batches(mark, skip):
            if batch.keep.any():
                found = self.model.capture(batch.tokens, batch.attention_mask, list(self.hooks))
                keep = batch.keep
                values = {name: x[keep.to(x.device)] for name, x in found.items()}
                if self._n_heads is not None:
                    values = {name: by_head(x, self._n_heads)[heads:] for name, x in values.items()}
                yield Rows.of(self._places(batch)[heads:], values)
                heads = 0

    def _places(self, batch: ContextBatch) -> Places:
        places = batch.places()
        return places if self._n_heads is None else places.by_head(self._n_heads)

    def _batches(
        self, mark: Mapping[str, int], skip: int
    ) -> Iterator[tuple[dict[str, int], ContextBatch]]:
        """Batches of contexts, and the mark of each, in which the rows that were asked for count.

        Args:
            mark: of the first batch: the number and the context of the text with which it begins, and
                the tokens before it.
            skip: the number of tokens, from the start of the source, that do not count.
        """
        if self._stream is None:  # read before
            self._stream = self._opened()
            self._beginning = list(itertools.islice(self._stream, FINGERPRINT_TEXTS))
        texts, self._stream = itertools.chain(self._beginning, self._stream), None
        read = hashlib.sha256()
        n, whole = mark["n"], mark == _START
        batches = self.tokenization.batches(
            _hashed(itertools.islice(texts, mark["row"], None), read, self.tokenization.spelt),
            self._batch_size,
            first_row=mark["row"],
            first_chunk=mark["chunk"],
        )
        for batch in batches:
            first = batch.contexts[0]
            here = {"row": first.row, "chunk": first.chunk, "n": n}
            ahead = batch.keep.flatten().cumsum(dim=0).reshape(batch.keep.shape) + n
            keep = batch.keep & (ahead > skip)
            if self._max_tokens is not None:
                keep &= ahead <= self._max_tokens
            n = min(int(ahead.max()), self._max_tokens or int(ahead.max()))
            if whole:  # whoever reads may stop here
                self._n_tokens, self._read = n, read.hexdigest()
            yield here, dataclasses.replace(batch, keep=keep)
            if n == self._max_tokens:
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
            per_head=None if self._n_heads is None else True,
            context_size=cutting.context_size,
            prepend_bos=self.tokenization.prepend_bos,
            keep_special_tokens=cutting.keep_special_tokens,
            dataset_path=described["texts"] if isinstance(self._texts, str | Path) else None,
            texts=described["texts"],
            text_field=described.get("text_field"),
            split=described.get("split"),
            texts_fingerprint=texts_fingerprint(self._beginning, self.tokenization.spelt),
            texts_read_sha256=self._read,
            vocabulary_sha256=self.tokenization.vocabulary_sha256(),
            batch_size=self._batch_size,
            max_tokens=self._max_tokens,
            n_tokens=self._n_tokens,
            tokens={} if (tokens := self.tokenization.tokens) is None else tokens.record(),
        )

    def _opened(self) -> Iterator[str | Ids]:
        return iterate_texts(self._texts, text_field=self._text_field, split=self._split)


def texts_fingerprint(texts: Iterable[str | Ids], spelt: Callable[[str | Ids], str] = str) -> str:
    """A digest of the first texts, `FINGERPRINT_TEXTS` at most.

    Args:
        spelt: gives the text that ids stand for (`Tokenization.spelt`); by default the numbers
            themselves stand for it.
    """
    digest = hashlib.sha256()
    for _ in _hashed(itertools.islice(texts, FINGERPRINT_TEXTS), digest, spelt):
        pass
    return digest.hexdigest()


def heads_at(lm: ReadableModel, hooks: Sequence[str]) -> int:
    """The number of heads at hooks that are split by head.

    Raises:
        ValueError: a hook is not, the numbers differ, or the model cannot tell them.
    """
    if not isinstance(lm, HookedModel):
        raise ValueError(f"per_head=True needs a model that knows its heads, got {type(lm).__name__}")
    numbers = {hook: lm.n_heads(hook) for hook in hooks}
    if len(set(numbers.values())) > 1:
        told = ", ".join(f"{n} at {hook!r}" for hook, n in numbers.items())
        raise ValueError(
            f"per_head=True needs hooks with the same number of heads, since their rows share labels, "
            f"got {told}; build them one by one"
        )
    return next(iter(numbers.values()))


def by_head(x: Float[Tensor, "n all_heads"], n_heads: int) -> Float[Tensor, "n_by_head width"]:
    """Rows with heads side by side as a row for each head, the heads of a row one after the other."""
    return x.unflatten(-1, (n_heads, -1)).flatten(0, 1)


def hook_list(hook_names: str | int | Sequence[str | int]) -> list[str]:
    """One name or several as a list. A whole number stands for the output of the layer of that number.

    Raises:
        TypeError: not a string or whole number, nor a sequence of them.
        ValueError: there is none, or one stands there twice.
    """
    names = [hook_names] if isinstance(hook_names, str | int) else hook_names
    if not isinstance(names, Sequence) or not all(
        type(name) is int or isinstance(name, str) for name in names
    ):
        raise TypeError(f"hook_names must be a hook name or a list of them, got {hook_names!r}")
    found = [name if isinstance(name, str) else f"blocks.{name}.hook_resid_post" for name in names]
    _check_different(found)
    return found


def hooks_of(lm: ReadableModel, names: Sequence[str]) -> list[str]:
    """The hooks of a model that names stand for, of which some have a "*" for the number of a layer.

    Raises:
        ValueError: one does not exist, or is meant twice.
    """
    found = [hook for name in names for hook in expanded(name, lambda one: lm.check_hooks([one]))]
    _check_different(found)
    return found


def _check_different(names: Sequence[str]) -> None:
    if not names or len(set(names)) != len(names):
        raise ValueError(f"hook_names must be one or more different names, got {list(names)}")


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


def _hashed(
    texts: Iterable[str | Ids], digest: "hashlib._Hash", spelt: Callable[[str | Ids], str]
) -> Iterator[str | Ids]:
    """Pass texts on, adding each to the digest; lengths keep ["ab"] from being ["a", "b"].

    Ids count as the text that they stand for, so that a digest does not tell who tokenised it.
    """
    for text in texts:
        data = spelt(text).encode("utf-8", errors="surrogatepass")
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
        yield text
