"""Which tokens count, beside the rules of `Cutting`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from itda_lens.records.arguments import check_fields

TokenKind = Literal["word", "number", "punctuation", "space"]
"""Kinds of tokens, by their characters: with a letter, else with a digit, else with another visible
character, else of white space alone."""


@dataclass(frozen=True)
class TokenFilter:
    """A choice of the tokens that count. A token must pass all conditions that are given.

    The model reads the other tokens too: they only give no rows.

    Attributes:
        roles: only tokens of messages of these roles, such as "assistant"; for chats.
        kinds: only tokens of these kinds; see `TokenKind`.
        only: a regular expression; only tokens that have a character in one of its matches in the text.
        drop: a regular expression; no token that has a character in one of its matches.

    Raises:
        ValueError: a list is empty, or an expression is no regular expression of Python's `re`.
        TypeError: a field is of another type.
    """

    roles: Sequence[str] | None = None
    kinds: Sequence[TokenKind] | None = None
    only: str | None = None
    drop: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("roles", "kinds"):
            given = getattr(self, name)
            if given is not None:
                if not given:
                    raise ValueError(f"{name} must be one or more, or None for all, got none")
                object.__setattr__(self, name, tuple(given))
        for name in ("only", "drop"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise ValueError(
                    f"{name} must be a regular expression, got {getattr(self, name)!r}: {error}"
                ) from error

    def counts(
        self, text: str, spans: Sequence[tuple[int, int]], roles: Sequence[str | None]
    ) -> list[bool]:
        """For each token of a text, whether it counts.

        Args:
            text: the whole text.
            spans: the characters (start, end) of each token.
            roles: the role of each token; None outside of chats.
        """
        only, drop = (
            None if pattern is None else _covered(pattern, text) for pattern in (self.only, self.drop)
        )
        return [
            (self.roles is None or role in self.roles)
            and (self.kinds is None or kind_of(text[start:end]) in self.kinds)
            and (only is None or any(only[start:end]))
            and (drop is None or not any(drop[start:end]))
            for (start, end), role in zip(spans, roles, strict=True)
        ]

    def record(self) -> dict[str, Any]:
        """The conditions that are given, as plain data."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
            if value is not None
        }


def kind_of(token: str) -> TokenKind:
    """The kind of a token's text."""
    if any(character.isalpha() for character in token):
        return "word"
    if any(character.isdigit() for character in token):
        return "number"
    return "punctuation" if token.strip() else "space"


def _covered(pattern: str, text: str) -> bytearray:
    """For each character of a text, 1 if a match holds it."""
    covered = bytearray(len(text))
    for match in re.finditer(pattern, text):
        covered[match.start() : match.end()] = b"\1" * (match.end() - match.start())
    return covered
