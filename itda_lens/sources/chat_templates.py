"""Conversations rendered by a model's own chat template, and which characters belong to whom.

A template is a program that writes text around and between the contents of messages. A conversation is
rendered twice to find the characters that it wrote: once as it is, and once with a mark in the place of
each content. The text between the marks is the form.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from itda_lens.records import text_digest

Message = Mapping[str, Any]
"""A message of a conversation: "role" and "content", and whatever else the template reads."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that every template is asked to render. A template may name others."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Part(NamedTuple):
    """Characters of a rendered conversation that belong together.

    Attributes:
        start, end: the characters.
        role: of the message that they belong to; None if the template wrote them for none, or if it
            cannot be told for which.
        special: whether they belong to the form, not to the content of a message.
    """

    start: int
    end: int
    role: str | None
    special: bool


class RenderedChat(str):
    """A conversation as the model reads it.

    Attributes:
        parts: every character once, in order.
    """

    __slots__ = ("parts",)
    parts: tuple[Part, ...]

    def __new__(cls, text: str, parts: Sequence[Part]) -> "RenderedChat":
        made = super().__new__(cls, text)
        made.parts = tuple(parts)
        return made

    def of_tokens(self, spans: Sequence[tuple[int, int]]) -> list[Part]:
        """The part of each token, given its characters.

        A token with a character of a content belongs to the content.
        """
        found, first = [], 0
        for start, end in spans:
            while first + 1 < len(self.parts) and self.parts[first].end <= start:
                first += 1
            inside = [self.parts[first]]
            for part in self.parts[first + 1 :]:
                if part.start >= end:
                    break
                inside.append(part)
            found.append(next((part for part in inside if not part.special), inside[0]))
        return found


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        options: more arguments for the template, such as `enable_thinking` or `date_string`.

    Raises:
        ValueError: the tokenizer has no template, or several and none of them is the default.
    """

    tokenizer: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    source: str = field(init=False, repr=False)
    """The text of the template."""
    _closings: dict[tuple[Any, ...], int | None] = field(default_factory=dict, init=False, repr=False)
    """The answers of `_closing` and `_header`: templates write the same text again and again."""

    def __post_init__(self) -> None:
        try:
            source = self.tokenizer.get_chat_template()
        except (AttributeError, ValueError) as error:
            name = getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__
            raise ValueError(
                f"chats need a model with a chat template, but the tokenizer of {name!r} has none: take "
                "the model that was tuned on chats, or set tokenizer.chat_template"
            ) from error
        object.__setattr__(self, "source", source)

    def sha256(self) -> str:
        """Tells templates apart."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def check_role(self, role: str, where: str) -> None:
        """Refuse a role that is not one of `ROLES` and that the template does not name.

        Most templates would render it all the same.

        Raises:
            ValueError: it is such a role; the message begins with `where`.
        """
        if role not in ROLES and not any(quote + role + quote in self.source for quote in "'\""):
            raise ValueError(
                f"{where}: role must be one of {', '.join(ROLES)}, or a role that the chat template "
                f"names, got {role!r}"
            )

    def rendered(self, messages: Sequence[Message], where: str = "the conversation") -> RenderedChat:
        """A conversation as text, with the part of each character.

        Args:
            messages: the messages, in order.
            where: the conversation in words, for messages of errors.

        Raises:
            ValueError: the template refuses the conversation; or it changes a content by more than white
                space at its ends, leaves it out or writes it twice, so that nobody can tell which
                characters are content. (Contents of assistants may be changed if the template marks them
                by `{% generation %}`.)
        """
        for i, message in enumerate(messages):
            self.check_role(message["role"], f"{where}, message {i}")
        text = self._render(messages, where)
        try:
            contents = self._contents(messages, text, where)
        except ValueError:
            if not _GENERATION.search(self.source):
                raise
            marked = self._generated(messages, text, where)
            contents = self._contents(messages, text, where, marked)
        return RenderedChat(text, _parts(len(text), contents))

    def _render(self, messages: Sequence[Message], where: str) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **self.options)
        except Exception as error:  # a template is a program, and raises what it likes
            raise ValueError(f"{where}: the model's chat template refuses it: {error}") from error

    def _contents(
        self, messages: Sequence[Message], text: str, where: str,
        generated: Sequence[tuple[int, int]] | None = None,
    ) -> list[Part]:  # fmt: skip
        """The parts of `text`, but form between two contents of which nothing is known.

        Args:
            generated: the characters of assistants' contents; default: to be found like all others.
        """
        whose = [
            i
            for i, message in enumerate(messages)
            if message.get("content") and (generated is None or message["role"] != "assistant")
        ]
        marked = _Marked.of(messages, whose)
        skeleton = self._render(marked.messages, where)
        pieces = marked.pieces(skeleton, where)
        found: list[Part] = []
        at = 0
        for n, piece in enumerate(pieces):
            before, after = whose[n - 1] if n else None, whose[n] if n < len(whose) else None
            if not text.startswith(piece, at):
                raise _changed(where, before if before is not None else 0, messages)
            if generated is None:
                found += self._form(marked, pieces, n, at, before, after)
            at += len(piece)
            if after is not None:
                content, following = messages[after]["content"], pieces[n + 1]
                ends = n + 2 == len(pieces)
                for candidate in (content, content.strip(), content.rstrip(), content.lstrip()):
                    end = at + len(candidate)
                    if text.startswith(candidate + following, at) and (
                        not ends or end + len(following) == len(text)
                    ):
                        break
                else:
                    raise _changed(where, after, messages)
                found.append(Part(at, end, messages[after]["role"], special=False))
                at = end
        found += [Part(start, end, "assistant", special=False) for start, end in generated or ()]
        return sorted((p for p in found if p.end > p.start), key=lambda part: part.start)

    def _form(
        self, marked: "_Marked", pieces: Sequence[str], n: int, at: int,
        before: int | None, after: int | None,
    ) -> list[Part]:  # fmt: skip
        """The parts of the form between two contents: the end of one message, the start of the next."""
        end = at + len(pieces[n])
        if before is None and after is None:
            return [Part(at, end, None, special=True)]
        if after is None:
            last = marked.messages[-1] if before == len(marked.messages) - 1 else {}
            return [Part(at, end, last.get("role"), special=True)]
        if before is None:
            role = marked.messages[after]["role"]
            own = self._header(pieces[0], role) if after == 0 else None
            middle = end if own is None else end - own
            return [Part(at, middle, None, special=True), Part(middle, end, role, special=True)]
        closing = self._closing(marked, pieces, n, before, after)
        if closing is None:
            return [Part(at, end, None, special=True)]
        whose = marked.messages[before]["role"], marked.messages[after]["role"]
        middle = at + closing
        return [Part(at, middle, whose[0], special=True), Part(middle, end, whose[1], special=True)]

    def _closing(
        self, marked: "_Marked", pieces: Sequence[str], n: int, before: int, after: int
    ) -> int | None:
        """How much of the piece after a message still belongs to it, found by leaving out the rest.

        None: there is a message without content between, or the template writes a conversation that ends
        there in another way.
        """
        if after != before + 1:
            return None
        key = (pieces[n], marked.messages[before]["role"], marked.messages[after]["role"], n == 1)
        if key not in self._closings:
            known = None
            try:
                prefix = self._render(marked.messages[: before + 1], "")
                last = prefix.split(marked.marks[n - 1])[-1]
                known = len(last) if pieces[n].startswith(last) else None
            except ValueError:  # some templates take conversations of some forms only
                pass
            self._closings[key] = known
        return self._closings[key]

    def _header(self, piece: str, role: str) -> int | None:
        """How much of the text before the first content belongs to its message.

        The rest, such as a BOS token or a system prompt of the template's own, is written once for the
        whole conversation. It is missing where the same role speaks again. A system message comes once,
        so that all before it is taken as its own.
        """
        if role != "user":
            return len(piece)
        key = ("header", piece)
        if key not in self._closings:
            roles = ("user", "assistant", "user")
            marked = _Marked.of([{"role": one, "content": one} for one in roles], range(3))
            known = None
            try:
                pieces = marked.pieces(self._render(marked.messages, ""), "")
                closing = self._closing(marked, pieces, 2, 1, 2)
                header = None if closing is None else pieces[2][closing:]
                known = len(header) if header and piece.endswith(header) else None
            except ValueError:
                pass
            self._closings[key] = known
        return self._closings[key]

    def _generated(self, messages: Sequence[Message], text: str, where: str) -> list[tuple[int, int]]:
        """The characters that the template marks as an assistant's, without special tokens."""
        encoded = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True}, **self.options,
        )  # fmt: skip
        special = {*self.tokenizer.all_special_ids}
        spans: list[tuple[int, int]] = []
        for token, mask, (start, end) in zip(
            encoded["input_ids"], encoded["assistant_masks"], encoded["offset_mapping"], strict=True
        ):
            if not mask or token in special:
                continue
            if spans and not text[spans[-1][1] : start].strip():
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
        if not spans:
            raise ValueError(f"{where}: the chat template marks nothing as an assistant's")
        return spans


class _Marked(NamedTuple):
    """A conversation with marks in the place of contents."""

    messages: list[dict[str, Any]]
    marks: list[str]
    whose: list[int]

    @classmethod
    def of(cls, messages: Sequence[Message], whose: Sequence[int]) -> "_Marked":
        plain = json.dumps([dict(message) for message in messages], default=str)
        name = f"mark{text_digest(plain):016x}of"
        marks = [f"{name}{i}x" for i in whose]
        marked = [dict(message) for message in messages]
        for i, mark in zip(whose, marks, strict=True):
            marked[i]["content"] = mark
        return cls(marked, marks, list(whose))

    def pieces(self, skeleton: str, where: str) -> list[str]:
        """The text before, between and after the marks."""
        pieces, rest = [], skeleton
        for i, mark in zip(self.whose, self.marks, strict=True):
            times = rest.count(mark)
            if times != 1:
                told = "leaves it out or changes the order" if times == 0 else f"writes it {times} times"
                raise ValueError(
                    f"{where}, message {i}: content cannot be told from the form, since the chat "
                    f"template {told}"
                )
            before, rest = rest.split(mark)
            pieces.append(before)
        return [*pieces, rest]


def _changed(where: str, i: int, messages: Sequence[Message]) -> ValueError:
    return ValueError(
        f"{where}, message {i}: content cannot be told from the form, since the chat template changes "
        f"the {messages[i]['role']}'s content"
    )


def _parts(length: int, known: Sequence[Part]) -> list[Part]:
    """The known parts, with form of no known role between them where there is a gap."""
    parts: list[Part] = []
    at = 0
    for part in known:
        if part.start > at:
            parts.append(Part(at, part.start, None, special=True))
        if part.start >= at:
            parts.append(part)
            at = part.end
    if at < length or not parts:
        parts.append(Part(at, length, None, special=True))
    return parts
