"""Labels: where each atom came from, and how they travel inside a JSON config."""

import base64
import binascii
import json
import math
import operator
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, overload

_COMPACT_PREFIX = "zlib+base64:"

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

    def __str__(self) -> str:
        place = self.place if self.name is None else f"{self.place}: {self.name}"
        return place if self.token is None else f"{self.token!r} ({place})"


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
