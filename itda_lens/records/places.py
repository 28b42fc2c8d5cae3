"""The places of the rows of a stream, in columns: a million tokens must not make a million objects."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import overload

import numpy as np
from jaxtyping import Int, UInt64
from numpy.typing import NDArray

from itda_lens.records.hashing import mix64
from itda_lens.records.labels import CONTEXT_CHARS, Label, as_label

_COLUMNS = np.dtype(
    [(name, np.int64) for name in ("row", "chunk", "position", "start", "end", "offset")]
    + [("identity", np.uint64)]
)

_NO_TEXT = -1
"""`start` and `end` of a row that came from no text."""


class Places(Sequence[Label]):
    """The places of rows, one each; as a sequence, their labels, each made when it is asked for.

    Columns, each a numpy array with an entry a row:

    - `row`, `chunk`, `position`: as in `Label`.
    - `start`, `end`: the token's characters in its text; -1 where there is no text.
    - `identity`: 64 bits that name the place whatever the tokenizer, the contexts and the order of the
      texts: a hash of the text and of `start`. Samples of a stream are drawn by it.
    """

    def __init__(self, columns: np.ndarray, origins: NDArray[np.object_]) -> None:
        # `origins` holds for each row its text (of which `offset` characters are cut off in front), or
        # the label that the user gave, or None. All rows of a text refer to one string.
        self._columns, self._origins = columns, origins

    @classmethod
    def numbered(cls, start: int, stop: int) -> "Places":
        """Rows about which nothing is known but their number."""
        columns = _empty(stop - start)
        columns["row"] = np.arange(start, stop)
        columns["identity"] = _identity_without_text(columns)
        return cls(columns, np.full(stop - start, None, dtype=object))

    @classmethod
    def at(
        cls,
        row: Int[np.ndarray, " n"],
        chunk: Int[np.ndarray, " n"] | int = 0,
        position: Int[np.ndarray, " n"] | int = 0,
    ) -> "Places":
        """Rows that came from no text: `of` these triples, without an object for each row.

        Args:
            row: the number of the item (image, file, recording) that each row came from.
            chunk, position: where in the item. Each triple must come once in a stream.
        """
        columns = _empty(len(row))
        columns["row"], columns["chunk"], columns["position"] = row, chunk, position
        columns["identity"] = mix64(_identity_without_text(columns))
        return cls(columns, np.full(len(row), None, dtype=object))

    @classmethod
    def of(cls, labels: "Sequence[Label | tuple[int, int, int]]") -> "Places":
        """The places that these labels name; places themselves stay as they are.

        Rows of one label are told apart by their order.

        Raises:
            TypeError: one is neither a `Label` nor a (row, chunk, position) triple.
        """
        if isinstance(labels, Places):
            return labels
        given = [as_label(label) for label in labels]
        columns = _empty(len(given))
        for i, label in enumerate(given):
            start, end = label.chars or (_NO_TEXT, _NO_TEXT)
            columns[i] = (label.row, label.chunk, label.position, start, end, 0, 0)
        columns["identity"] = _identity_without_text(columns)
        columns["identity"] = mix64(columns["identity"] + _occurrence(columns["identity"]))
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
        )

    def take(self, indices: "Int[np.ndarray, ' m'] | slice") -> "Places":
        """The places at these indices."""
        return Places(self._columns[indices], self._origins[indices])

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
        return Places(columns, origins)

    def bare(self) -> "Places":
        """A copy that holds no text, for rows that will need no label."""
        return Places(self._columns, np.full(len(self), None, dtype=object))

    def state(self) -> dict[str, np.ndarray]:
        """All of it as two arrays of numbers; `restored` takes them back.

        Texts go as they are held: call `quoting` or `bare` first where whole texts would be too much.
        """
        origins = [asdict(o) if isinstance(o, Label) else o for o in self._origins]
        encoded = json.dumps(origins, separators=(",", ":")).encode()
        columns = np.stack([self._columns[name].astype(np.int64) for name in _COLUMNS.names or ()])
        return {"columns": columns, "origins": np.frombuffer(encoded, dtype=np.uint8).copy()}

    @classmethod
    def restored(cls, state: Mapping[str, np.ndarray]) -> "Places":
        """The places that gave this state."""
        columns = _empty(state["columns"].shape[1])
        for name, values in zip(_COLUMNS.names or (), state["columns"], strict=True):
            columns[name] = values.astype(_COLUMNS[name])
        origins = np.empty(len(columns), dtype=object)
        for i, origin in enumerate(json.loads(state["origins"].tobytes())):
            if isinstance(origin, dict):
                origin = Label(**{**origin, "chars": origin["chars"] and tuple(origin["chars"])})
            origins[i] = origin
        return cls(columns, origins)

    def order(self) -> Int[np.ndarray, " n"]:
        """Indices that put the places into the order of the stream: by row, chunk and position."""
        return np.lexsort((self.position, self.chunk, self.row))

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
        mine, theirs = (places._columns[["row", "chunk", "position"]] for places in (self, other))
        same = len(self) == len(other) and bool((mine == theirs).all())
        return same and bool((self.start == other.start).all() and (self.end == other.end).all())

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"Places({len(self)} rows)"

    def _label(self, index: int) -> Label:
        origin = self._origins[index]
        if isinstance(origin, Label):
            return origin
        row, chunk, position, start, end, offset, _ = self._columns[index].tolist()
        if start == _NO_TEXT:
            return Label(row, chunk, position)
        if origin is None:
            return Label(row, chunk, position, (start, end))
        first, last = start - offset, end - offset
        token = origin[first:last]
        before, after = (
            origin[max(0, first - CONTEXT_CHARS) : first],
            origin[last : last + CONTEXT_CHARS],
        )
        return Label(row, chunk, position, (start, end), token, f"{before}[[{token}]]{after}")


def _empty(n: int) -> np.ndarray:
    columns = np.zeros(n, dtype=_COLUMNS)
    columns["start"] = columns["end"] = _NO_TEXT
    return columns


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
