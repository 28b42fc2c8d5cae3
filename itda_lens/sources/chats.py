"""Conversations from wherever the user has them, and which of their tokens count."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from itda_lens.records import check_fields
from itda_lens.sources.texts import (
    LINES,
    check_text,
    describe_texts,
    iterate_fields,
    names_data_set,
)

SpecialTokens = Literal["keep", "cap", "exclude"]
"""Whether tokens of the template's form count: all of them, a limited share of the rows, or none."""

Conversation = Sequence[Mapping[str, Any]]
"""Messages in order, each with "role" and "content"."""


@dataclasses.dataclass(frozen=True)
class Chats:
    """Conversations to be read one by one, each in the form of the model's own chat template.

    Pass it wherever texts are taken: to `build`, `collect`, `evaluate`, `activations_of`, `diff_models`.

    Attributes:
        conversations: a list or iterator of conversations, each a list of messages such as
            `{"role": "user", "content": "Hello"}`, or an object with such a list in `field`; a .jsonl or
            .json file of such objects; a `datasets` data set, or the name of one. An iterator is read
            into memory.
        special_tokens: whether the tokens of the form (special tokens, the names of roles, line breaks
            between messages, a system prompt of the template's own) count as rows. "keep": all do.
            "exclude": none does. "cap": at most `special_share` of the rows of each conversation, chosen
            by a hash of its text.
        special_share: that share, more than 0 and less than 1.
        template_options: more arguments for the template, such as `{"enable_thinking": False}`. Some
            templates write today's date unless an option says another.
        field: the field or column that holds the messages.
        split: the split of a data set that is named.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a field is of another type, or `conversations` are of none of these kinds.
    """

    conversations: str | Path | Iterable[Any]
    special_tokens: SpecialTokens = "keep"
    special_share: float = 0.1
    template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    field: str = "messages"
    split: str = "train"

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.special_share < 1:
            raise ValueError(
                f"special_share must be more than 0 and less than 1, got {self.special_share}"
            )
        try:
            json.dumps(dict(self.template_options))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"template_options must be plain data for JSON, got {self.template_options!r:.80}"
            ) from error
        given = self.conversations
        if isinstance(given, Mapping | Set):
            raise TypeError(
                "conversations must be a list of conversations, a file or a data set, got "
                f"{type(given).__name__}; of a DatasetDict, pass one of its splits"
            )
        if (
            isinstance(given, Sequence)
            and given
            and isinstance(given[0], Mapping)
            and "role" in given[0]
        ):
            raise TypeError(
                "conversations must be a list of conversations, got a single one; pass [conversation]"
            )
        if isinstance(given, Iterator):
            object.__setattr__(self, "conversations", list(given))

    def __iter__(self) -> Iterator[Conversation]:
        """The conversations, checked, in order.

        Raises:
            ValueError: there is no such file or data set, or a conversation is not of the right form.
        """
        for where, value in self._items():
            yield checked_conversation(value, where)

    @cached_property
    def roles(self) -> Mapping[str, str]:
        """The roles in it, each with its first place in words.

        This reads everything that can be read twice: all but data sets, of which it reads the first
        conversation.

        Raises:
            ValueError: there is no conversation, or one is not of the right form.
        """
        streamed = isinstance(self.conversations, str | Path) and names_data_set(self.conversations)
        found: dict[str, str] = {}
        for number, messages in enumerate(self):
            for i, message in enumerate(messages):
                found.setdefault(message["role"], f"conversation {number}, message {i}")
            if streamed:
                break
        if not found:
            raise ValueError("conversations must hold at least one conversation, got none")
        return found

    def description(self) -> dict[str, str]:
        """Metadata entries about where the conversations came from."""
        return describe_texts(self.conversations, self.field, self.split)

    def _items(self) -> Iterator[tuple[str, Any]]:
        given = self.conversations
        if isinstance(given, str | Path):
            if names_data_set(given) and Path(given).suffix.lower() in (".json", *LINES):
                raise ValueError(f"conversations must be a file that is there, got {str(given)!r}")
            yield from iterate_fields(given, field=self.field, split=self.split)
            return
        for i, item in enumerate(given):
            if isinstance(item, Mapping):
                if self.field not in item:
                    raise ValueError(
                        f"conversation {i} has no field {self.field!r}, only {sorted(item)}"
                    )
                item = item[self.field]
            yield f"conversation {i}", item


def checked_conversation(value: Any, where: str) -> Conversation:
    """The messages of a conversation, without entries that are None.

    Raises:
        ValueError: it is no list of messages, has none, or has no content in any; a message has no role
            or a content that is no string. The message of the error begins with `where`.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ValueError(f"{where} must be a list of messages, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{where} must have at least one message, got none")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            has = f"an object with {sorted(message)}" if isinstance(message, Mapping) else repr(message)
            raise ValueError(f"{where}, message {i} must have 'role' and 'content', got {has:.80}")
        role, content = message["role"], message["content"]
        if not isinstance(role, str):
            raise ValueError(f"{where}, message {i}: role must be a string, got {role!r:.80}")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"{where}, message {i}: content must be a string, got {content!r:.80}")
        check_text(content or "", f"{where}, message {i}")
        kept = {key: entry for key, entry in message.items() if entry is not None}
        messages.append(kept | {"content": content})
    if not any((message["content"] or "").strip() for message in messages):
        raise ValueError(f"{where} must have some content, but all of its messages are empty")
    return messages
