"""Texts cut into contexts of tokens, in batches, with a place for every token."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from itda_lens.records import Cutting, Places, Tag, TokenFilter, text_digest
from itda_lens.sources.texts import Ids, check_text

_SPACES = " \u0120\u2581"
"""How tokens spell a space: as it is, in byte-level tokenizers, in SentencePiece's."""

_INCOMPLETE = "\ufffd"
"""How tokenizers spell a character that ends in a later token."""


@dataclass(frozen=True)
class Context:
    """Consecutive tokens of one text, as the model sees them.

    Attributes:
        row: index of the text.
        chunk: which consecutive context of the text.
        text: the whole text.
        ids: token ids, the BOS token first if there is one.
        spans: characters (start, end) of each token in `text`; (0, 0) for the BOS token. Of a character
            that is several tokens, each has the whole character. A space that the tokenizer has added
            has no character: start and end are equal.
        digest: `text_digest(text)`, computed once for all contexts of a text.
        counts: for each token, whether it may count at all; None if all may.
        tags: for each token, more facts about it; None where there are none, as for texts.
    """

    row: int
    chunk: int
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    digest: int
    counts: Sequence[bool] | None = None
    tags: Sequence[Tag] | None = None


@dataclass(frozen=True)
class ContextBatch:
    """Contexts side by side, padded on the right.

    Attributes:
        contexts: the contexts.
        tokens: their ids, padded.
        attention_mask: True on tokens, False on padding.
        keep: True on tokens whose activations count.
    """

    contexts: list[Context]
    tokens: Int[Tensor, "batch seq"]
    attention_mask: Bool[Tensor, "batch seq"]
    keep: Bool[Tensor, "batch seq"]

    def places(self) -> Places:
        """Places of the kept tokens, in the order in which `keep` indexes activations."""
        which, position = self.keep.nonzero().numpy().T
        spans = np.zeros((*self.keep.shape, 2), dtype=np.int64)
        for i, context in enumerate(self.contexts):
            spans[i, : len(context.spans)] = context.spans
        texts = np.empty(len(self.contexts), dtype=object)
        texts[:] = [context.text for context in self.contexts]

        def each(name: str, dtype: type = np.int64) -> np.ndarray:
            return np.array([getattr(context, name) for context in self.contexts], dtype=dtype)[which]

        places = Places.tokens(
            each("row"), each("chunk"), position, spans[which, position], texts[which],
            each("digest", np.uint64),
        )  # fmt: skip
        if all(context.tags is None for context in self.contexts):
            return places
        tags = [context.tags or [None] * len(context.ids) for context in self.contexts]
        return places.tagged([tags[i][j] for i, j in zip(which, position, strict=True)])

    def special(self) -> Bool[Tensor, "batch seq"]:
        """True on tokens that belong to the form of a chat, and not to its content."""
        special = torch.zeros_like(self.keep)
        for i, context in enumerate(self.contexts):
            for j, tag in enumerate(context.tags or ()):
                special[i, j] = tag.special
        return special


@dataclass(frozen=True)
class Tokenization:
    """How the texts for one model become contexts.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        cutting: how they are cut.
        tokens: more conditions on the tokens that count.

    Raises:
        ValueError: the tokenizer is not a fast one, or has no BOS token though `cutting` asks for it; or
            `tokens` asks for roles, which texts have none of.
    """

    tokenizer: Any
    cutting: Cutting = field(default_factory=Cutting)
    tokens: TokenFilter | None = None

    has_roles: ClassVar[bool] = False
    """Whether tokens have roles: those of chats do."""

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                "labels need the characters of each token, which only a fast tokenizer gives; got "
                f"{type(self.tokenizer).__name__}"
            )
        if self.prepend_bos and self.tokenizer.bos_token_id is None:
            raise ValueError("prepend_bos=True, but the tokenizer has no BOS token")
        if self.tokens is not None and self.tokens.roles is not None and not self.has_roles:
            raise ValueError(
                f"roles are those of chats (itda_lens.Chats), and texts have none, got "
                f"roles={self.tokens.roles}"
            )

    @cached_property
    def prepend_bos(self) -> bool:
        """Whether contexts begin with the BOS token: as `cutting` says, or if the tokenizer has one.

        TransformerLens gives a tokenizer without a BOS token the EOS token in its place. Such a
        tokenizer has none here, so that the library that loads a model does not decide: contexts begin
        with that token only where `cutting` asks for it.
        """
        asked = self.cutting.prepend_bos
        return self._has_own_bos() if asked is None else asked

    def _has_own_bos(self) -> bool:
        bos, eos = self.tokenizer.bos_token_id, getattr(self.tokenizer, "eos_token_id", None)
        settings = getattr(self.tokenizer, "init_kwargs", {})
        return bos is not None and not (bos == eos and settings.get("bos_token") is None)

    @cached_property
    def _special(self) -> Int[Tensor, " n"]:
        return special_ids(self.tokenizer)

    def vocabulary_sha256(self) -> str:
        """Tells tokenizers apart: a digest of the tokens and their ids."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    def contexts(
        self, texts: Iterable[str | Ids], first_row: int = 0, first_chunk: int = 0
    ) -> Iterator[Context]:
        """Cut texts into contexts, in order.

        A text that begins with the BOS token already, as chat templates write it, gets no second one.

        Args:
            texts: the texts from number `first_row` on: strings, or the ids of a text's tokens, which
                stay as they are.
            first_chunk: contexts of the first of them that are left out at its beginning.

        Raises:
            ValueError: a text has a lone surrogate.
        """
        for row, item in enumerate(texts, first_row):
            if isinstance(item, str):
                check_text(item, f"text {row}")
            for context in self._contexts_of(row, item):
                if row > first_row or context.chunk >= first_chunk:
                    yield context

    def _contexts_of(self, row: int, item: str | Ids) -> Iterator[Context]:
        bos = [self.tokenizer.bos_token_id] if self.prepend_bos else []
        step = self.cutting.context_size - len(bos)
        text, ids, spans = self._spelt_with_spans(item)
        digest = text_digest(text)
        if bos and ids[:1] == bos:
            ids, spans = ids[1:], spans[1:]
        for chunk, start in enumerate(range(0, len(ids), step)):
            own = [(0, 0)] * len(bos) + spans[start : start + step]
            yield Context(
                row=row,
                chunk=chunk,
                text=text,
                ids=bos + ids[start : start + step],
                spans=own,
                digest=digest,
                counts=None if self.tokens is None else self._filtered(text, own, [None] * len(own)),
            )

    def _filtered(
        self, text: str, spans: Sequence[tuple[int, int]], roles: Sequence[str | None]
    ) -> list[bool]:
        """For each token, whether `tokens` lets it count."""
        return [True] * len(spans) if self.tokens is None else self.tokens.counts(text, spans, roles)

    def spelt(self, item: str | Ids) -> str:
        """The text itself, or the text that ids stand for."""
        return item if isinstance(item, str) else self._spelt_with_spans(item)[0]

    def _encoded(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of a text, without a BOS token of the tokenizer's own, and their characters."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = list(encoded["input_ids"])
        return ids, self._spans(text, ids, encoded["offset_mapping"])

    def _spelt_with_spans(self, item: str | Ids) -> tuple[str, list[int], list[tuple[int, int]]]:
        """A text, or the text that ids stand for; the ids of its tokens, and the characters of each.

        A BOS token at the beginning is left out where each context gets one: it is no part of the text.

        Most ids come from the tokenizer: their text then has them again, and its characters are known.
        Others do not, such as those of a block that begins inside of a word. They are spelt one after
        the other. A token may end inside of a character, and how a token is spelt may depend on the one
        before it. So a few tokens are spelt anew each time, until the text has grown by whole
        characters.
        """
        if isinstance(item, str):
            return item, *self._encoded(item)
        ids = item
        if self.prepend_bos and ids[:1] == (self.tokenizer.bos_token_id,):
            ids = ids[1:]
        text = self._decoded(ids)
        again, spans = self._encoded(text)
        if tuple(again) == ids:
            return text, again, spans
        text, spans = "", []
        before, first = 0, 0  # tokens from `before` on are spelt; up to `first` they are in the text
        for i in range(len(ids)):
            known, grown = self._decoded(ids[before:first]), self._decoded(ids[before : i + 1])
            if grown.endswith(_INCOMPLETE) and i + 1 < len(ids):
                continue
            new = grown[len(known) :]
            spans += [(len(text), len(text) + len(new))] * (i + 1 - first)
            text += new
            before, first = first, i + 1
        return text, list(ids), spans

    def _decoded(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _spans(
        self, text: str, ids: Sequence[int], given: Sequence[Sequence[int]]
    ) -> list[tuple[int, int]]:
        """The characters of each token; none for white space that the tokenizer has added.

        Of tokens of spaces alone, tokenizers that begin a text with a space give the first of these the
        characters of the token after it, and those that trim spaces give it no characters.
        """
        spans = [(start, end) for start, end in given]
        for i, (start, end) in enumerate(spans):
            trimmed = start == end
            if not trimmed and (i + 1 == len(spans) or spans[i + 1][0] != start):
                continue
            spaces = self._spaces(ids[i])
            if trimmed and spaces and text[max(0, start - spaces) : start] == " " * spaces:
                spans[i] = (start - spaces, start)
            elif trimmed and spaces and i == 0 and text.startswith(" " * spaces):
                spans[i] = (0, spaces)  # at the start of a text they are cut off at the other end
            elif spaces and not text[start:end].startswith(" "):
                spans[i] = (start, start)
        return spans

    def _spaces(self, token: int) -> int:
        """How many spaces a token is; 0 for any other token."""
        spelt = self.tokenizer.convert_ids_to_tokens(token)
        return 0 if spelt.strip(_SPACES) else len(spelt)

    def batches(
        self, texts: Iterable[str | Ids], batch_size: int, first_row: int = 0, first_chunk: int = 0
    ) -> Iterator[ContextBatch]:
        """Contexts of `texts`, `batch_size` at a time; the other arguments as in `contexts`."""
        held: list[Context] = []
        for context in self.contexts(texts, first_row, first_chunk):
            held.append(context)
            if len(held) == batch_size:
                yield self.batch(held)
                held = []
        if held:
            yield self.batch(held)

    def batch(self, contexts: list[Context]) -> ContextBatch:
        """Pad `contexts` to the longest and mask what does not count."""
        lengths = torch.tensor([len(context.ids) for context in contexts])
        width = int(lengths.max())
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else (self.tokenizer.eos_token_id or 0)
        tokens = torch.full((len(contexts), width), pad, dtype=torch.long)
        for row, context in enumerate(contexts):
            tokens[row, : len(context.ids)] = torch.tensor(context.ids)
        attention_mask = torch.arange(width) < lengths[:, None]
        keep = attention_mask.clone()
        for row, context in enumerate(contexts):
            if context.counts is not None:
                keep[row, : len(context.ids)] &= torch.tensor(context.counts, dtype=torch.bool)
        if not self.cutting.keep_special_tokens:
            keep[:, 0] = False
            keep &= ~torch.isin(tokens, self._special)
        return ContextBatch(list(contexts), tokens, attention_mask, keep)


def special_ids(tokenizer: Any) -> Int[Tensor, " n"]:
    """Ids of the tokens that a tokenizer calls special, by any of its ways to say so."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    declared = {i for i, token in added.items() if token.special}
    return torch.tensor(sorted({*tokenizer.all_special_ids, *declared}), dtype=torch.long)
