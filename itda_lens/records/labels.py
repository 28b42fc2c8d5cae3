"""Labels: where each atom came from, and how they travel inside a JSON config."""

import base64
import binascii
import json
import math
import operator
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import overload

_COMPACT_PREFIX = "zlib+base64:"


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
    """

    row: int
    chunk: int = 0
    position: int = 0
    chars: tuple[int, int] | None = None
    token: str | None = None
    context: str | None = None
    cosine: float = 1.0

    @property
    def key(self) -> tuple[int, int, int]:
        """(row, chunk, position): what makes two labels the same place."""
        return (self.row, self.chunk, self.position)

    def __str__(self) -> str:
        place = f"text {self.row}, chunk {self.chunk}, position {self.position}"
        return place if self.token is None else f"{self.token!r} ({place})"


_COLUMNS = tuple(field.name for field in fields(Label))


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
        """One ASCII string that survives JSON, dtype casts and deep copies of a config."""
        columns = {name: [getattr(label, name) for label in self._labels] for name in _COLUMNS}
        text = json.dumps(columns, separators=(",", ":"))
        return _COMPACT_PREFIX + base64.b64encode(zlib.compress(text.encode(), 9)).decode()

    @classmethod
    def from_compact(cls, text: str) -> "Labels":
        """Inverse of `to_compact`.

        Raises:
            ValueError: the string is damaged or not of this form.
        """
        try:
            if not text.startswith(_COMPACT_PREFIX):
                raise ValueError(f"does not start with {_COMPACT_PREFIX!r}")
            packed = base64.b64decode(text[len(_COMPACT_PREFIX) :], validate=True)
            columns = json.loads(zlib.decompress(packed))
            rows = zip(*(columns[name] for name in _COLUMNS), strict=True)
            items = (dict(zip(_COLUMNS, row, strict=True)) for row in rows)
            return cls(
                [Label(**{**item, "chars": item["chars"] and tuple(item["chars"])}) for item in items]
            )
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error, binascii.Error) as error:
            raise ValueError(f"damaged labels: {error}") from error


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
    numbers = (value.row, value.chunk, value.position, *(value.chars or ()))
    if all(type(number) is int for number in numbers) and type(value.cosine) is float:
        known = value
    else:
        try:
            row, chunk, position, *chars = (operator.index(number) for number in numbers)
        except TypeError as error:
            raise TypeError(f"labels must hold whole numbers, got {value!r}") from error
        known = replace(
            value, row=row, chunk=chunk, position=position, cosine=float(value.cosine),
            chars=(chars[0], chars[1]) if chars else None,
        )  # fmt: skip
    if not math.isfinite(known.cosine):
        raise ValueError(f"a label's cosine must be finite, got {known.cosine}")
    return known
