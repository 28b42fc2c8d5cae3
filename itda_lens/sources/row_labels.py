"""Labels that a user gives to rows, in any of several forms, as places."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from itda_lens.records import Label, Places, Tag, as_label
from itda_lens.records.labels import TEXT

MOST_NAME_BYTES = 1000
"""The longest name of a row, as JSON writes it. Labels travel in a dictionary's config, which takes
about two kilobytes for each."""

ROW = "row"
"""The kind of a row about which the user says nothing."""


def check_item(item: object) -> None:
    """Refuse a kind of row that is no word; None stands for the default.

    Raises:
        ValueError: it is empty.
        TypeError: it is no string.
    """
    if item is not None and not (isinstance(item, str) and item):
        raise (ValueError if isinstance(item, str) else TypeError)(
            f"item must be a word for what a row is, such as 'image', got {item!r}"
        )


class Names(NamedTuple):
    """Names of rows that a table holds: None for a row that has none there."""

    names: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.names)


class RowLabels:
    """The places of the rows of a stream, by the labels that a user gave.

    A string or a whole number is the name of its row. `Label`s, triples and `Places` say where a row
    came from. Without labels, row i is known by its number.

    Args:
        labels: one for each row; None if there are none, or if each batch brings its own.
        item: the kind of thing that a row is, such as "image"; default: "row". Places say it themselves.
        n_rows: the number of rows; None if it is not known yet.

    Raises:
        ValueError: labels of another number than rows; `item` is empty or goes with `Places`; a name is
            too long.
        TypeError: a label is none.
    """

    def __init__(self, labels: Any, item: str | None, n_rows: int | None = None) -> None:
        check_item(item)
        self._item = item
        self._seen: dict[int, int] = {}
        self._labels = None if labels is None else self._read(labels)
        if labels is not None and n_rows is not None and len(labels) != n_rows:
            raise ValueError(f"labels must be one per row: {len(labels)} labels for {n_rows} rows")

    def places(self, start: int, stop: int, own: Any = None) -> Places:
        """The places of rows `start` to `stop`.

        Args:
            own: labels that came with these rows.

        Raises:
            ValueError, TypeError: as the class; or rows have labels of their own and others too.
        """
        if own is not None and self._labels is not None:
            raise ValueError("labels must come with the rows or apart from them, got both")
        given = self._labels if own is None else self._read(own)
        if given is None:
            return Places.numbered(start, stop).tagged(_tag(self._item or ROW, None))
        part = given if own is not None else given[start:stop]
        if len(part) != stop - start:
            n, rows = (len(given), "more rows") if own is None else (len(part), f"{stop - start} rows")
            raise ValueError(f"labels must be one per row: {n} labels for {rows}")
        if isinstance(part, Places):
            return part
        kind = self._item or ROW
        tags = [_tag(kind, name) for name in _names(part)]
        return Places.numbered(start, stop).tagged(tags)

    def check_number(self, n_rows: int) -> None:
        """Refuse labels of another number than the rows that there were.

        Raises:
            ValueError: there are more labels than rows.
        """
        if self._labels is not None and len(self._labels) != n_rows:
            raise ValueError(f"labels must be one per row: {len(self._labels)} labels for {n_rows} rows")

    def _read(self, labels: Any) -> Any:
        """Labels as `Places`, or as a sequence of names that is not looked at yet."""
        if isinstance(labels, Places):
            if self._item is not None:
                raise ValueError(
                    "item goes with strings, numbers, triples and Label, but Places say themselves "
                    f"what their rows are; got item={self._item!r}"
                )
            return labels
        if isinstance(labels, Names):
            return labels.names
        if isinstance(labels, Tensor):
            labels = labels.detach().cpu().numpy()
        if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iuU":
            return labels
        if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind == "O":
            labels = labels.tolist()
        if not isinstance(labels, Sequence) or isinstance(labels, str | bytes):
            raise TypeError(f"labels must be one for each row: {_FORMS}; got {_brief(labels)}")
        wrong = next((i for i, label in enumerate(labels) if not _is_name(label)), None)
        if wrong is None:
            return labels
        if wrong > 0:
            raise TypeError(
                f"labels must all be of one form: {_FORMS}; got {_brief(labels[wrong])} for row {wrong}"
            )
        given = [as_label(label) for label in labels]
        if self._item is not None:
            given = [replace(one, kind=self._item) if one.kind == TEXT else one for one in given]
        return Places.of(given, self._seen)


_FORMS = "strings, whole numbers, Label or (row, chunk, position)"


def _is_name(label: Any) -> bool:
    return isinstance(label, str | Integral) and not isinstance(label, bool)


def _names(labels: Any) -> list[str | None]:
    items = labels.tolist() if isinstance(labels, np.ndarray) else labels
    return [None if item is None else str(item) for item in items]


@lru_cache(maxsize=2**16)
def _tag(kind: str, name: str | None) -> Tag:
    """Rows of one name share a tag, which was checked once."""
    for what, text in (("labels", name), ("item", kind)):
        length = 0 if text is None else len(json.dumps(text))
        if text is not None and length > MOST_NAME_BYTES:
            raise ValueError(
                f"{what} must take at most {MOST_NAME_BYTES} bytes each, got {length} that begin with "
                f"{text[:40]!r}"
            )
    return Tag(kind, name)


def _brief(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {value.shape}"
    return f"{value!r:.80}" if not isinstance(value, Label) else str(value)
