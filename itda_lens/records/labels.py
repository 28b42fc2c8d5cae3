"""Labels: where each atom came from, and how they travel inside a JSON config."""

import base64
import binascii
import json
import math
import operator
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from itda_lens.records.files import replacing
from itda_lens.terminal import html_text, printable

if TYPE_CHECKING:
    import pandas

_COMPACT_PREFIX = "zlib+base64:"

CONTEXT_CHARS = 40
"""Characters of text on each side of a token that its label quotes."""

MOST_BYTES = 64 * 1024, 2048
"""The longest JSON that stands for labels: the first number of bytes, and the second for each label.
Labels of texts take some 400. A few megabytes of a hostile file would unpack to gigabytes."""

MOST_LABELS = 2**17
"""The number of labels for which `Labels.from_compact` makes room where it is not told how many they
are."""


TEXT = "text"
"""The kind of a row that a language model read in a text."""


@dataclass(frozen=True)
class Label:
    """Where one atom came from.

    Attributes:
        row: index of the text in the texts that the dictionary was built from.
        chunk: number of the context within that text.
        position: token index in that context as the model saw it; the BOS token, if any, is 0.
        chars: the token's characters in the text, (start, end); None if unknown.
        token: the token's text; None if unknown.
        context: some of the text around the token, the token itself in [[ ]]; None if unknown.
        cosine: cosine of the atom to the activation that it came from, minus `b_dec`; 1 for an atom that
            was never updated, negative for the mirror image of one (`ITDA.nonnegative`).
        kind: the kind of thing that `row` counts, such as "text", "image" or "user".
        name: a name that the user gave to the row, such as the class of an image; None if there is none.
        role: who wrote the token of a chat, such as "user" or "assistant"; None outside of chats.
        special: whether the token belongs to the form of a chat and not to its content.
        head: the attention head whose output the row is; None for a row of the whole layer.
    """

    row: int
    chunk: int = 0
    position: int = 0
    chars: tuple[int, int] | None = None
    token: str | None = None
    context: str | None = None
    cosine: float = 1.0
    kind: str = TEXT
    name: str | None = None
    role: str | None = None
    special: bool = False
    head: int | None = None

    @property
    def key(self) -> tuple[int, ...]:
        """(row, chunk, position), and the head where there is one: labels of one place have one key."""
        place = (self.row, self.chunk, self.position)
        return place if self.head is None else (*place, self.head)

    @property
    def place(self) -> str:
        """The place in words, such as "text 3, chunk 0, position 5" or "image 391"."""
        parts = [f"{self.kind} {self.row}"]
        if self.kind == TEXT or self.chunk:
            parts.append(f"chunk {self.chunk}")
        if self.kind == TEXT or self.chunk or self.position:
            parts.append(f"position {self.position}")
        if self.head is not None:
            parts.append(f"head {self.head}")
        if self.role is not None:
            parts.append(self.role)
        if self.special:
            parts.append("special")
        return ", ".join(parts)

    def quoted(self) -> tuple[str, str, str]:
        """The text that the label quotes before its token, the token, and the text after it.

        The text itself may hold the marks, so that "[[token]]" can stand in it several times. The
        token's own comes after the `CONTEXT_CHARS` characters that labels quote, or after fewer where a
        text begins.
        """
        token, context = self.token or "", self.context or ""
        marked = f"[[{token}]]"
        start = CONTEXT_CHARS if self.chars is None else min(CONTEXT_CHARS, self.chars[0])
        if not context.startswith(marked, start):  # of labels made elsewhere
            start = context.find(marked)
        if start < 0:
            return context, token, ""
        return context[:start], token, context[start + len(marked) :]

    def searched(self, token_only: bool = False) -> str:
        """The text in which `Labels.search` looks: name, and token with the text around it."""
        if token_only:
            return self.token or ""
        quoted = "".join(self.quoted())
        return quoted if self.name is None else f"{self.name} {quoted}"

    def _repr_html_(self) -> str:
        """The quoted text with the token in bold, for notebooks."""
        if self.context is None:
            return html_text(self)
        before, token, after = map(html_text, self.quoted())
        return f'<code style="white-space:pre-wrap">{before}<b><mark>{token}</mark></b>{after}</code>'

    def __str__(self) -> str:
        place = self.place if self.name is None else f"{self.place}: {self.name}"
        return printable(place if self.token is None else f"{self.token!r} ({place})")


TABLES = (".jsonl", ".parquet")
"""Suffixes of the files that `Labels.save_table` writes."""

SHOWN = 20
"""Labels that a notebook shows."""

_COLUMNS = tuple(field.name for field in fields(Label))
_DEFAULTS = {field.name: field.default for field in fields(Label)}
_OPTIONAL = ("kind", "name", "role", "special", "head")
"""Columns that are written only where a label has something in them: versions before 0.2 do not know
them."""


class Labels(Sequence[Label]):
    """The labels of a dictionary's atoms, one each, in order."""

    def __init__(self, labels: Sequence[Label]) -> None:
        self._labels = list(labels)

    @overload
    def __getitem__(self, index: int) -> Label: ...
    @overload
    def __getitem__(self, index: slice) -> "Labels": ...
    def __getitem__(self, index: int | slice) -> "Label | Labels":
        if isinstance(index, slice):
            return Labels(self._labels[index])
        return self._labels[index]

    def __len__(self) -> int:
        return len(self._labels)

    def __iter__(self) -> Iterator[Label]:
        return iter(self._labels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels) and self._labels == other._labels

    def __repr__(self) -> str:
        return f"Labels({len(self)} labels)"

    def search(self, query: "str | re.Pattern[str]", *, token_only: bool = False) -> list[int]:
        """The atoms whose label has a text in it, or matches a regular expression.

        Args:
            query: a text, found in upper and lower case alike; or `re.compile(...)`.
            token_only: look at the token alone, and not at the text around it.

        Returns:
            Their indices, in order.

        Raises:
            TypeError: `query` is neither a string nor a compiled pattern.
            ValueError: `query` is empty.
        """
        if isinstance(query, str):
            if not query:
                raise ValueError("query must hold a character at least, got ''")
            low = query.lower()
            found = [low in label.searched(token_only).lower() for label in self._labels]
        elif isinstance(query, re.Pattern):
            found = [query.search(label.searched(token_only)) is not None for label in self._labels]
        else:
            raise TypeError(f"query must be a string or a compiled pattern, got {query!r}")
        return [i for i, own in enumerate(found) if own]

    def records(self) -> Iterator[dict[str, Any]]:
        """The labels as a table's rows: the atom's number, then the fields of `Label`."""
        for i, label in enumerate(self._labels):
            yield {"atom": i, **asdict(label)}

    def to_pandas(self) -> "pandas.DataFrame":
        """The labels as a pandas table, with a column for the atom and one for each field of `Label`.

        Half characters, which no table file can hold, are written as escapes such as "\\ud800".
        """
        import pandas

        rows = [
            {name: _whole(value) if isinstance(value, str) else value for name, value in row.items()}
            for row in self.records()
        ]
        return pandas.DataFrame(rows, columns=["atom", *_COLUMNS])

    def save_table(self, path: str | Path) -> Path:
        """Write the labels as a table, whole or not at all: ".jsonl" (JSON lines) or ".parquet".

        Raises:
            ValueError: the name ends otherwise.
            OSError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix not in TABLES:
            raise ValueError(f"path must end in one of {', '.join(TABLES)}, got {str(path)!r}")
        with replacing(path) as (temporary,):
            if path.suffix == ".parquet":
                self.to_pandas().to_parquet(temporary)
            else:
                lines = "".join(json.dumps(row) + "\n" for row in self.records())
                temporary.write_text(lines, encoding="ascii")
        return path

    def _repr_html_(self) -> str:
        """A table of the first `SHOWN` labels, for notebooks."""
        rows = "".join(
            f'<tr><td>{i}</td><td style="text-align:left">{label._repr_html_()}</td></tr>'
            for i, label in enumerate(self._labels[:SHOWN])
        )
        more = f"<p>… and {len(self) - SHOWN:,} more</p>" if len(self) > SHOWN else ""
        return f"<table><tr><th>atom</th><th>came from</th></tr>{rows}</table>{more}"

    def to_compact(self) -> str:
        """One ASCII string that survives JSON, dtype casts and deep copies of a config.

        Raises:
            ValueError: tokens and contexts are longer than `from_compact` reads (`MOST_BYTES`).
        """
        columns = {name: [getattr(label, name) for label in self._labels] for name in _COLUMNS}
        for name in _OPTIONAL:
            if all(value == _DEFAULTS[name] for value in columns[name]):
                del columns[name]
        text = json.dumps(columns, separators=(",", ":"))
        if len(text) > (most := _most_bytes(len(self))):
            raise ValueError(
                f"labels must be shorter: {len(self)} of them take {len(text)} bytes in JSON, at most "
                f"{most} are allowed"
            )
        return _COMPACT_PREFIX + base64.b64encode(zlib.compress(text.encode(), 9)).decode()

    @classmethod
    def from_compact(cls, text: str, count: int | None = None) -> "Labels":
        """Inverse of `to_compact`.

        Args:
            text: the string.
            count: how many labels there must be; default: any number up to `MOST_LABELS`.

        Raises:
            ValueError: the string is damaged, not of this form, longer than `to_compact` makes any, or
                holds another number of labels.
        """
        try:
            if not text.startswith(_COMPACT_PREFIX):
                raise ValueError(f"does not start with {_COMPACT_PREFIX!r}")
            packed = base64.b64decode(text[len(_COMPACT_PREFIX) :], validate=True)
            columns = json.loads(_unpacked(packed, _most_bytes(MOST_LABELS if count is None else count)))
            names = [name for name in _COLUMNS if name in columns or name not in _OPTIONAL]
            rows = zip(*(columns[name] for name in names), strict=True)
            labels = cls([_read(dict(zip(names, row, strict=True))) for row in rows])
        except (
            ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error, binascii.Error,
        ) as error:  # fmt: skip
            raise ValueError(f"damaged labels: {error}") from error
        if count is not None and len(labels) != count:
            raise ValueError(f"damaged labels: {len(labels)} of them for {count} atoms")
        return labels


GivenLabel = Label | str | int | tuple[int, int, int]
"""A label as a user may give it: a name, a number, a `Label`, or a (row, chunk, position) triple."""


def label_from(given: GivenLabel, row: int, kind: str) -> Label:
    """The label of row `row` of some vectors: a string is its name, and an int its number in a list.

    Raises:
        TypeError: `given` is none of the forms of `GivenLabel`.
    """
    if isinstance(given, str):
        return Label(row=row, kind=kind, name=given)
    if isinstance(given, int) and not isinstance(given, bool):
        return Label(row=given, kind=kind)
    return as_label(given)


def _whole(text: str) -> str:
    """Text with half characters as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _most_bytes(count: int) -> int:
    fixed, each = MOST_BYTES
    return fixed + each * count


def _unpacked(packed: bytes, most: int) -> bytes:
    decompressor = zlib.decompressobj()
    unpacked = decompressor.decompress(packed, most)
    if decompressor.unconsumed_tail:
        raise ValueError(f"they unpack to more than {most} bytes")
    if not decompressor.eof:
        raise ValueError("they end too early")
    return unpacked


def _read(item: dict[str, Any]) -> Label:
    for name in ("token", "context", "name", "role"):
        if not isinstance(item.get(name), str | None):
            raise ValueError(f"{name} must be a string or null, got {item[name]!r}")
    chars = item["chars"]
    if chars is not None and not (isinstance(chars, list) and len(chars) == 2):
        raise ValueError(f"chars must be two numbers or null, got {chars!r}")
    return as_label(Label(**{**item, "chars": chars and tuple(chars)}))


def as_label(value: object) -> Label:
    """A `Label`, or one made from a (row, chunk, position) triple; numpy's numbers become Python's.

    Raises:
        TypeError: `value` is neither, or a number in it is no whole number.
        ValueError: the cosine is not finite.
    """
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3:
        value = Label(*value)
    if not isinstance(value, Label):
        raise TypeError(f"labels must be Label or (row, chunk, position), got {value!r}")
    if not isinstance(value.kind, str) or not isinstance(value.special, bool):
        raise TypeError(f"labels must have a string as kind and a boolean as special, got {value!r}")
    head = () if value.head is None else (value.head,)
    numbers = (value.row, value.chunk, value.position, *head, *(value.chars or ()))
    if all(type(number) is int for number in numbers) and type(value.cosine) is float:
        known = value
    else:
        try:
            row, chunk, position, *rest = (operator.index(number) for number in numbers)
        except TypeError as error:
            raise TypeError(f"labels must hold whole numbers, got {value!r}") from error
        chars = rest[len(head) :]
        known = replace(
            value, row=row, chunk=chunk, position=position, cosine=float(value.cosine),
            head=rest[0] if head else None, chars=(chars[0], chars[1]) if chars else None,
        )  # fmt: skip
    if not math.isfinite(known.cosine):
        raise ValueError(f"a label's cosine must be finite, got {known.cosine}")
    return known
