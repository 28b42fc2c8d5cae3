"""The places of the rows of a stream, in columns: a million tokens must not make a million objects."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple, overload

import numpy as np
from jaxtyping import Int, UInt64
from numpy.typing import NDArray

from itda_lens.records.hashing import mix64
from itda_lens.records.labels import TEXT, Label, as_label

CONTEXT_CHARS = 40
"""Characters of text on each side of a token that its label quotes."""

_COLUMNS = np.dtype(
    [(name, np.int64) for name in ("row", "chunk", "position", "start", "end", "offset", "head")]
    + [("identity", np.uint64)]
)

_NO_TEXT = -1
"""`start` and `end` of a row that came from no text."""

_NO_HEAD = -1
"""`head` of a row that is not the output of a single attention head."""


class Tag(NamedTuple):
    """Facts about a row beside its place: the fields of `Label` of these names.

    Rows share a tag: a stream needs one for each class or role, not one for each row.
    """

    kind: str = TEXT
    name: str | None = None
    role: str | None = None
    special: bool = False


ROW = Tag(kind="row")
"""The tag of a row about which only its number is known."""


class Places(Sequence[Label]):
    """The places of rows, one each; as a sequence, their labels, each made when it is asked for.

    Columns, each a numpy array with an entry a row:

    - `row`, `chunk`, `position`: as in `Label`.
    - `start`, `end`: the token's characters in its text; -1 where there is no text.
    - `head`: the attention head; -1 for a row that is not of a single head.
    - `identity`: 64 bits that name the place whatever the tokenizer, the contexts and the order of the
      texts: a hash of the text and of `start`. Samples of a stream are drawn by it.
    """

    def __init__(
        self,
        columns: np.ndarray,
        origins: NDArray[np.object_],
        tags: NDArray[np.object_] | None = None,
    ) -> None:
        # `origins` holds for each row its text (of which `offset` characters are cut off in front), or
        # the label that the user gave, or None. All rows of a text refer to one string. `tags` holds a
        # `Tag` or None, which stands for that of ordinary text.
        self._columns, self._origins = columns, origins
        self._tags = _nothing(len(columns)) if tags is None else tags

    @classmethod
    def numbered(cls, start: int, stop: int) -> "Places":
        """Rows about which nothing is known but their number."""
        columns = _empty(stop - start)
        columns["row"] = np.arange(start, stop)
        columns["identity"] = _identity_without_text(columns)
        return cls(columns, _nothing(stop - start)).tagged(ROW)

    @classmethod
    def at(
        cls,
        row: Int[np.ndarray, " n"],
        chunk: Int[np.ndarray, " n"] | int = 0,
        position: Int[np.ndarray, " n"] | int = 0,
        tags: Tag | Sequence[Tag | None] = ROW,
    ) -> "Places":
        """Rows that came from no text: `of` these triples, without an object for each row.

        Args:
            row: the number of the item (image, file, recording) that each row came from.
            chunk, position: where in the item. Each triple must come once in a stream.
            tags: what the items are, such as `Tag("image")`, or a tag for each row.
        """
        columns = _empty(len(row))
        columns["row"], columns["chunk"], columns["position"] = row, chunk, position
        columns["identity"] = mix64(_identity_without_text(columns))
        return cls(columns, _nothing(len(row))).tagged(tags)

    @classmethod
    def of(
        cls, labels: "Sequence[Label | tuple[int, int, int]]", seen: dict[int, int] | None = None
    ) -> "Places":
        """The places that these labels name; places themselves stay as they are.

        Rows of one label are told apart by their order.

        Args:
            labels: one for each row.
            seen: for labels that come in parts: an empty dictionary for the first part, and the same
                dictionary for each later part. All parts then are as one list of labels.

        Raises:
            TypeError: one is neither a `Label` nor a (row, chunk, position) triple.
        """
        if isinstance(labels, Places):
            return labels
        given = [as_label(label) for label in labels]
        columns = _empty(len(given))
        for i, label in enumerate(given):
            start, end = label.chars or (_NO_TEXT, _NO_TEXT)
            head = _NO_HEAD if label.head is None else label.head
            columns[i] = (label.row, label.chunk, label.position, start, end, 0, head, 0)
        columns["identity"] = _with_head(_identity_without_text(columns), columns["head"])
        occurrence = _occurrence(columns["identity"])
        if seen is not None:
            occurrence += _seen_before(columns["identity"], seen)
        columns["identity"] = mix64(columns["identity"] + occurrence)
        origins = np.empty(len(given), dtype=object)
        origins[:] = given
        return cls(columns, origins)

    @classmethod
    def tokens(
        cls,
        row: Int[np.ndarray, " n"],
        chunk: Int[np.ndarray, " n"],
        position: Int[np.ndarray, " n"],
        spans: Int[np.ndarray, "n 2"],
        texts: NDArray[np.object_],
        digests: UInt64[np.ndarray, " n"],
    ) -> "Places":
        """Tokens of texts.

        Args:
            spans: the characters of each token in its text.
            texts: each token's whole text: references, not copies.
            digests: of each token's text (`text_digest`).
        """
        columns = _empty(len(row))
        columns["row"], columns["chunk"], columns["position"] = row, chunk, position
        columns["start"], columns["end"] = spans[:, 0], spans[:, 1]
        columns["identity"] = mix64(digests + mix64(columns["start"].astype(np.uint64)))
        return cls(columns, texts)

    @classmethod
    def joined(cls, parts: "Sequence[Places]") -> "Places":
        """All places of several, in order."""
        if not parts:
            return cls.numbered(0, 0)
        return cls(
            np.concatenate([part._columns for part in parts]),
            np.concatenate([part._origins for part in parts]),
            np.concatenate([part._tags for part in parts]),
        )

    def tagged(self, tags: "Tag | Sequence[Tag | None]") -> "Places":
        """A copy with these tags, in the place of those from before: one for all rows, or one each.

        Raises:
            ValueError: there are tags of another number than rows.
        """
        if isinstance(tags, Tag):
            everywhere = np.empty(len(self), dtype=object)
            everywhere[:] = [tags] * len(self)
        else:
            if len(tags) != len(self):
                raise ValueError(f"tags must be one per row: {len(tags)} tags for {len(self)} rows")
            everywhere = np.empty(len(self), dtype=object)
            everywhere[:] = list(tags)
        return Places(self._columns, self._origins, everywhere)

    def by_head(self, n_heads: int) -> "Places":
        """Each place `n_heads` times in a row, once for each attention head.

        Heads of a token are drawn into samples apart from one another.
        """
        columns = np.repeat(self._columns, n_heads)
        columns["head"] = np.tile(np.arange(n_heads), len(self))
        columns["identity"] = _with_head(columns["identity"], columns["head"])
        return Places(columns, _repeated(self._origins, n_heads), _repeated(self._tags, n_heads))

    def take(self, indices: "Int[np.ndarray, ' m'] | slice") -> "Places":
        """The places at these indices."""
        return Places(self._columns[indices], self._origins[indices], self._tags[indices])

    def quoting(self) -> "Places":
        """A copy that holds, of each text, only the characters that the row's label quotes.

        For rows that are kept: a few rows of a text must not keep all of it in memory.
        """
        columns, origins = self._columns.copy(), self._origins.copy()
        for i, origin in enumerate(origins):
            if isinstance(origin, str):
                start, end, offset = (int(columns[name][i]) for name in ("start", "end", "offset"))
                first = max(0, start - CONTEXT_CHARS - offset)
                origins[i] = origin[first : end - offset + CONTEXT_CHARS]
                columns["offset"][i] = offset + first
        return Places(columns, origins, self._tags)

    def bare(self) -> "Places":
        """A copy that holds no text, for rows that will need no label."""
        return Places(self._columns, _nothing(len(self)), self._tags)

    def state(self) -> dict[str, np.ndarray]:
        """All of it as arrays of numbers; `restored` takes them back.

        Texts go as they are held: call `quoting` or `bare` first where whole texts would be too much.
        """
        held = list(dict.fromkeys(self._origins.tolist()))  # rows of a text hold one string
        texts = {origin: i for i, origin in enumerate(held)}
        numbers = {tag: i for i, tag in enumerate(dict.fromkeys(self._tags.tolist()))}
        columns = np.stack([self._columns[name].astype(np.int64) for name in _COLUMNS.names or ()])
        return {
            "columns": columns,
            "origins": _as_bytes([asdict(o) if isinstance(o, Label) else o for o in held]),
            "origin": np.array([texts[origin] for origin in self._origins], dtype=np.int64),
            "tags": _as_bytes(list(numbers)),
            "tag": np.array([numbers[tag] for tag in self._tags], dtype=np.int64),
        }

    @classmethod
    def restored(cls, state: Mapping[str, np.ndarray]) -> "Places":
        """The places that gave this state."""
        columns = _empty(state["columns"].shape[1])
        for name, values in zip(_COLUMNS.names or (), state["columns"], strict=True):
            columns[name] = values.astype(_COLUMNS[name])
        held = json.loads(state["origins"].tobytes())
        for i, origin in enumerate(held):
            if isinstance(origin, dict):
                held[i] = Label(**{**origin, "chars": origin["chars"] and tuple(origin["chars"])})
        origins = _nothing(len(columns))
        origins[:] = [held[i] for i in state["origin"].tolist()]
        tags = _nothing(len(columns))
        known = [tag and Tag(*tag) for tag in json.loads(state["tags"].tobytes())]
        tags[:] = [known[i] for i in state["tag"].tolist()]
        return cls(columns, origins, tags)

    def order(self) -> Int[np.ndarray, " n"]:
        """Indices that put the places into the order of the stream: by row, chunk, position, head."""
        return np.lexsort((self.head, self.position, self.chunk, self.row))

    @property
    def row(self) -> Int[np.ndarray, " n"]:
        return self._columns["row"]

    @property
    def chunk(self) -> Int[np.ndarray, " n"]:
        return self._columns["chunk"]

    @property
    def position(self) -> Int[np.ndarray, " n"]:
        return self._columns["position"]

    @property
    def start(self) -> Int[np.ndarray, " n"]:
        return self._columns["start"]

    @property
    def end(self) -> Int[np.ndarray, " n"]:
        return self._columns["end"]

    @property
    def head(self) -> Int[np.ndarray, " n"]:
        return self._columns["head"]

    @property
    def tags(self) -> "NDArray[np.object_]":
        """The tag of each row; None stands for that of ordinary text."""
        return self._tags

    @property
    def identity(self) -> UInt64[np.ndarray, " n"]:
        return self._columns["identity"]

    def __len__(self) -> int:
        return len(self._columns)

    @overload
    def __getitem__(self, index: int) -> Label: ...
    @overload
    def __getitem__(self, index: slice) -> "Places": ...
    def __getitem__(self, index: int | slice) -> "Label | Places":
        return self.take(index) if isinstance(index, slice) else self._label(index)

    def __iter__(self) -> Iterator[Label]:
        return (self._label(i) for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Places):
            return NotImplemented
        mine, theirs = (
            places._columns[["row", "chunk", "position", "head"]] for places in (self, other)
        )
        same = len(self) == len(other) and bool((mine == theirs).all())
        return same and bool((self.start == other.start).all() and (self.end == other.end).all())

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"Places({len(self)} rows)"

    def _label(self, index: int) -> Label:
        origin, tag = self._origins[index], self._tags[index]
        row, chunk, position, start, end, offset, head, _ = self._columns[index].tolist()
        found = Label(row, chunk, position) if not isinstance(origin, Label) else origin
        if start != _NO_TEXT and not isinstance(origin, Label):
            found = replace(found, chars=(start, end), **_quotation(origin, start, end, offset))
        if tag is not None:
            found = replace(found, **tag._asdict())
        return found if head == _NO_HEAD else replace(found, head=head)


def _quotation(text: str | None, start: int, end: int, offset: int) -> dict[str, str]:
    """The token and its context, of a text that has lost its first `offset` characters."""
    if text is None:
        return {}
    first, last = start - offset, end - offset
    token = text[first:last]
    before, after = text[max(0, first - CONTEXT_CHARS) : first], text[last : last + CONTEXT_CHARS]
    return {"token": token, "context": f"{before}[[{token}]]{after}"}


def _empty(n: int) -> np.ndarray:
    columns = np.zeros(n, dtype=_COLUMNS)
    columns["start"] = columns["end"] = _NO_TEXT
    columns["head"] = _NO_HEAD
    return columns


def _nothing(n: int) -> "NDArray[np.object_]":
    return np.full(n, None, dtype=object)


def _repeated(objects: "NDArray[np.object_]", times: int) -> "NDArray[np.object_]":
    return objects[np.repeat(np.arange(len(objects)), times)]


def _as_bytes(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value, separators=(",", ":")).encode(), dtype=np.uint8).copy()


def _with_head(
    identity: UInt64[np.ndarray, " n"], head: Int[np.ndarray, " n"]
) -> UInt64[np.ndarray, " n"]:
    return np.where(head == _NO_HEAD, identity, mix64(identity + mix64(head.astype(np.uint64))))


def _identity_without_text(columns: np.ndarray) -> UInt64[np.ndarray, " n"]:
    """A hash of the row's number and of its characters or, without these, its chunk and position."""
    within = mix64(columns["chunk"].astype(np.uint64)) + columns["position"].astype(np.uint64)
    by_characters = columns["start"] != _NO_TEXT
    within = np.where(by_characters, columns["start"].astype(np.uint64), within)
    return mix64(mix64(columns["row"].astype(np.uint64)) + mix64(within))


def _occurrence(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """How often each value came before."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(values) else np.empty(0, bool)
    begins = np.maximum.accumulate(np.where(first, np.arange(len(values)), 0))
    count = np.empty(len(values), dtype=np.uint64)
    count[order] = np.arange(len(values)) - begins
    return count


def _seen_before(values: UInt64[np.ndarray, " n"], seen: dict[int, int]) -> UInt64[np.ndarray, " n"]:
    """How often each value came in earlier parts; `seen` then counts this part too."""
    distinct, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    earlier = [seen.get(value, 0) for value in distinct.tolist()]
    for value, before, count in zip(distinct.tolist(), earlier, counts.tolist(), strict=True):
        seen[value] = before + count
    return np.array(earlier, dtype=np.uint64)[where]
