"""The activations of a language model on conversations, each one read alone."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from itda_lens.records import Cutting, Provenance, Tag, TokenFilter, agreed, checked, mix64, text_digest
from itda_lens.sources.chat_templates import ChatTemplate, RenderedChat
from itda_lens.sources.chats import Chats, SpecialTokens
from itda_lens.sources.contexts import Context, Tokenization
from itda_lens.sources.model_source import ModelSource, check_context_size
from itda_lens.sources.models import language_model
from itda_lens.sources.readable import Loader, ReadableModel
from itda_lens.sources.source import Rows

logger = logging.getLogger(__name__)

CHAT_TOKENS = 2048
"""Tokens of a conversation that are read where nobody says another number, if the model has room for
them."""

KIND = "chat"
"""The kind of a row that a language model read in a conversation; see `Label.kind`."""


@dataclass(frozen=True)
class ChatTokenization(Tokenization):
    """How rendered conversations become contexts: one each.

    A conversation that is longer than `cutting.context_size` is cut there, and the rest is not read: a
    context that began in the middle of a message would not have the form. No BOS token is added, since
    the template writes one where the model wants it.

    Attributes:
        chats: which tokens of the form count.
        read: how many conversations were read (under "all"), and how many of them were cut ("cut").
    """

    chats: Chats = field(default_factory=lambda: Chats(()))
    read: Counter[str] = field(default_factory=Counter, compare=False)

    has_roles = True

    def contexts(self, texts: Iterable[str], *where: int, **named: int) -> Iterator[Context]:
        """One context for each rendered conversation; see `Tokenization.contexts`."""
        self.read.clear()
        return super().contexts(texts, *where, **named)

    def _contexts_of(self, row: int, text: str) -> Iterator[Context]:
        if not isinstance(text, RenderedChat):
            raise TypeError(f"chats must be rendered by a ChatTemplate, got {type(text).__name__}")
        ids, spans = self._encoded(text)
        self.read.update(["all", "cut"] if len(ids) > self.cutting.context_size else ["all"])
        ids, spans = ids[: self.cutting.context_size], spans[: self.cutting.context_size]
        special = set(self._special.tolist())
        tags = [
            Tag(KIND, role=part.role, special=part.special or token in special)
            for part, token in zip(text.of_tokens(spans), ids, strict=True)
        ]
        if not ids:
            return
        digest = text_digest(text)
        counts = self._filtered(text, spans, [tag.role for tag in tags])
        counts = _limited(counts, tags, self.chats.special_tokens, self.chats.special_share, digest)
        yield Context(row, 0, text, ids, spans, digest, counts, tags)


def _limited(
    counts: Sequence[bool], tags: Sequence[Tag], policy: SpecialTokens, share: float, digest: int
) -> list[bool]:
    """Which tokens count once the policy for the form has been applied."""
    ordinary = [count and not tag.special for count, tag in zip(counts, tags, strict=True)]
    if policy == "exclude":
        return ordinary
    if policy == "keep":
        return list(counts)
    special = np.flatnonzero([count and tag.special for count, tag in zip(counts, tags, strict=True)])
    most = int(sum(ordinary) * share / (1 - share))
    order = np.argsort(mix64(special.astype(np.uint64) + np.uint64(digest)), kind="stable")
    for position in special[order[:most]]:
        ordinary[position] = True
    return ordinary


class ChatSource(ModelSource):
    """The activations of the tokens of conversations that count.

    Conversations are padded to the longest of a batch, on the right whatever the tokenizer prefers, and
    masked: each is read as if it were alone.

    Args:
        model: a Hugging Face name or local folder, or a loaded model; see `language_model`.
        chats: the conversations, and which of their tokens count; or conversations alone.
        hook_names: one hook point or several, by the names that the model knows.
        context_size: tokens of a conversation that are read; default: `CHAT_TOKENS`, or all that the
            model has positions for, if these are fewer.
        tokens: more conditions on the tokens that count.
        batch_size: conversations per forward pass.
        max_tokens: end after exactly this number of tokens that count; default: after all of them.
        tokenizer, model_name, loader, device: as in `language_model`.

    Raises:
        ValueError: as `ModelSource`; the tokenizer has no chat template; or a conversation is empty, has
            a role that is not known, or is refused by the template.
        TypeError: a model, conversation or hook name of the wrong kind.
    """

    @checked
    def __init__(
        self,
        model: Any,
        chats: Chats | str | Path | Iterable[Any],
        hook_names: str | Sequence[str],
        *,
        context_size: int | None = None,
        tokens: TokenFilter | None = None,
        batch_size: int = 16,
        max_tokens: int | None = None,
        tokenizer: Any = None,
        model_name: str | None = None,
        loader: Loader = "bridge",
        device: str | torch.device | None = None,
    ) -> None:
        self._chats = chats if isinstance(chats, Chats) else Chats(chats)
        _ = self._chats.roles  # looked at before the model is loaded
        lm = language_model(model, tokenizer=tokenizer, name=model_name, loader=loader, device=device)
        self._reading = ChatReading(lm, self._chats, context_size=context_size, tokens=tokens)
        super().__init__(
            lm, (), hook_names, self._reading.tokenization.cutting, batch_size=batch_size,
            max_tokens=max_tokens,
        )  # fmt: skip
        self.tokenization = self._reading.tokenization

    def rows(self, skip: int = 0) -> Iterator[Rows]:
        """The rows of each forward pass; see `ActivationSource.rows`."""
        yield from super().rows(skip)
        self._reading.tell_cut()

    def provenance(self, hook: str) -> Provenance:
        """The model, the conversations and how they were read; after reading, also how much was read."""
        known, source = super().provenance(hook), self._chats.conversations
        described = self._chats.description()
        return replace(
            known,
            dataset_path=str(source) if isinstance(source, str | Path) else None,
            texts=described["texts"],
            text_field=described.get("text_field"),
            split=described.get("split"),
            chats=self._reading.record(),
        )

    def _opened(self) -> Iterator[str]:
        return self._reading.rendered()


class ChatReading:
    """How a model reads some chats: the template, and how rendered conversations become contexts.

    Args:
        lm: the model.
        chats: the conversations, and which of their tokens count.
        context_size, tokens: as in `ChatSource`.

    Attributes:
        template: the model's own.
        tokenization: for the conversations that `rendered` gives.

    Raises:
        ValueError: the tokenizer has no chat template, `context_size` is more than the model's, or a
            conversation is not of the right form or has a role that is not known.
    """

    def __init__(
        self, lm: ReadableModel, chats: Chats, *, context_size: int | None = None,
        tokens: TokenFilter | None = None,
    ) -> None:  # fmt: skip
        if context_size is None:
            context_size = min(CHAT_TOKENS, lm.max_context or CHAT_TOKENS)
        check_context_size(lm, context_size)
        self._chats = chats
        self.template = ChatTemplate(lm.tokenizer, chats.template_options)
        for role, where in chats.roles.items():
            self.template.check_role(role, where)
        cutting = Cutting(context_size, keep_special_tokens=chats.special_tokens != "exclude")
        self.tokenization = ChatTokenization(lm.tokenizer, cutting, tokens, chats=chats)

    def rendered(self) -> Iterator[RenderedChat]:
        """The conversations as the model reads them, in order."""
        for i, messages in enumerate(self._chats):
            yield self.template.rendered(messages, f"conversation {i}")

    def record(self) -> dict[str, Any]:
        """Everything that decides how conversations are read, and how many were cut, as plain data."""
        chats, read = self._chats, self.tokenization.read
        record: dict[str, Any] = {"special_tokens": chats.special_tokens}
        if chats.special_tokens == "cap":
            record["special_share"] = chats.special_share
        if chats.template_options:
            record["template_options"] = dict(chats.template_options)
        record["template_sha256"] = self.template.sha256()
        return record | ({"read": read["all"], "cut": read["cut"]} if read else {})

    def tell_cut(self) -> None:
        """Log how many conversations were cut, if any were."""
        read = self.tokenization.read
        if read["cut"]:
            logger.warning(
                "%d of %d conversations were longer than context_size=%d tokens and were cut there",
                read["cut"], read["all"], self.tokenization.cutting.context_size,
            )  # fmt: skip


def chat_context_size(records: Sequence[Provenance]) -> int | None:
    """The context size of those dictionaries that were built from chats; None if none was.

    Raises:
        ValueError: two differ.
    """
    return agreed([record for record in records if record.chats], "context_size").context_size


def text_or_chat_source(
    model: Any,
    texts: Any,
    hook_names: str | Sequence[str],
    context_size: int | None,
    prepend_bos: bool | None,
    keep_special_tokens: bool,
    *,
    text_field: str,
    split: str,
    **options: Any,
) -> ModelSource:
    """A `ChatSource` for `Chats`, else a `ModelSource`.

    Args:
        context_size: default: that of `Cutting` for texts, that of `ChatSource` for chats.
        options: what both sources take.

    Raises:
        ValueError: `prepend_bos` or `keep_special_tokens` is given for chats; or as the sources.
    """
    if isinstance(texts, Chats):
        if prepend_bos is not None or keep_special_tokens:
            raise ValueError(
                "prepend_bos and keep_special_tokens are for texts: a chat begins as its template says, "
                "and Chats(special_tokens=...) says whether special tokens count; got "
                f"prepend_bos={prepend_bos}, keep_special_tokens={keep_special_tokens}"
            )
        return ChatSource(model, texts, hook_names, context_size=context_size, **options)
    cutting = Cutting.given(context_size, prepend_bos, keep_special_tokens)
    return ModelSource(model, texts, hook_names, cutting, text_field=text_field, split=split, **options)
