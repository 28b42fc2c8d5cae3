"""Tables that a stream of tokens fills: a few entries for each atom, whatever the length of the text."""

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from itda_lens.records import Places

COMPACT_ABOVE = 50_000
"""Places that are held before those that no entry needs any more are dropped."""


class EntryTable:
    """The entries of highest priority for each atom.

    Attributes:
        priority: of each entry, [d_sae, n], the highest first; -inf where there is none.
        row: the number of its token in the stream; -1 where there is none.
        value: its coefficient.
    """

    def __init__(self, d_sae: int, n: int) -> None:
        self.priority = np.full((d_sae, n), -np.inf)
        self.row = np.full((d_sae, n), -1, dtype=np.int64)
        self.value = np.zeros((d_sae, n), dtype=np.float32)

    def update(
        self,
        atom: Int[np.ndarray, " m"],
        priority: Float[np.ndarray, " m"],
        row: Int[np.ndarray, " m"],
        value: Float[np.ndarray, " m"],
    ) -> None:
        """Offer entries. Of equal priorities the earlier row stays, whatever the batches."""
        better = priority > self.priority[atom, -1]
        atom, priority, row, value = (part[better] for part in (atom, priority, row, value))
        if not len(atom):
            return
        n = self.priority.shape[1]
        touched, group = np.unique(atom, return_inverse=True)
        group = np.concatenate([np.repeat(np.arange(len(touched)), n), group])
        priority = np.concatenate([self.priority[touched].ravel(), priority])
        row = np.concatenate([self.row[touched].ravel(), row])
        value = np.concatenate([self.value[touched].ravel(), value.astype(np.float32)])
        order = np.lexsort((row, -priority, group))
        first = np.searchsorted(group[order], np.arange(len(touched)))
        kept = order[np.arange(len(order)) - first[group[order]] < n]
        self.priority[touched] = priority[kept].reshape(-1, n)
        self.row[touched] = row[kept].reshape(-1, n)
        self.value[touched] = value[kept].reshape(-1, n)


class KeptPlaces:
    """The places of those tokens that some table still has an entry of, with the text around them."""

    def __init__(self) -> None:
        self._rows = np.empty(0, dtype=np.int64)
        self._places = Places.numbered(0, 0)
        self._new: list[tuple[NDArray[np.int64], Places]] = []
        self._held, self._limit = 0, COMPACT_ABOVE

    def add(self, first_row: int, places: Places, tables: list[EntryTable]) -> None:
        """Keep the places of a batch that the tables refer to.

        Args:
            first_row: the number of the batch's first token in the stream.
            places: of all tokens of the batch.
            tables: all tables that refer to these places.
        """
        found = np.unique(np.concatenate([t.row[t.row >= first_row] for t in tables]))
        if len(found):
            self._new.append((found, places.take(found - first_row).quoting()))
            self._held += len(found)
        if self._held > self._limit:
            self.compact(tables)
            self._limit = 2 * self._held + COMPACT_ABOVE

    def compact(self, tables: list[EntryTable]) -> None:
        """Drop the places to which no table refers."""
        rows = np.concatenate([self._rows, *(rows for rows, _ in self._new)])
        places = Places.joined([self._places, *(places for _, places in self._new)])
        alive = np.isin(rows, np.concatenate([t.row.ravel() for t in tables]))
        self._rows, self._places, self._new = rows[alive], places.take(np.flatnonzero(alive)), []
        self._held = len(self._rows)

    def at(self, rows: Int[np.ndarray, " n"]) -> Places:
        """The places of these tokens; to be called after `compact`."""
        return self._places.take(np.searchsorted(self._rows, rows))


class SampledCodes:
    """The codes of a uniform sample of the stream's tokens: those of lowest priority.

    Attributes:
        priority: of each token.
        atoms, values: atoms and coefficients, padded with coefficients of 0.
        unexplained: share of each activation that its code leaves.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.priority = np.empty(0)
        self.atoms = np.empty((0, 0), dtype=np.int32)
        self.values = np.empty((0, 0), dtype=np.float32)
        self.unexplained = np.empty(0)

    def update(
        self,
        priority: Float[np.ndarray, " n"],
        atoms: Int[np.ndarray, "n k"],
        values: Float[np.ndarray, "n k"],
        unexplained: Float[np.ndarray, " n"],
    ) -> None:
        """Offer the tokens of a batch."""
        if len(self.priority) >= self._capacity:
            worth = priority < self.priority.max()
            priority, atoms, values = priority[worth], atoms[worth], values[worth]
            unexplained = unexplained[worth]
        k = max(self.atoms.shape[1], atoms.shape[1])
        self.priority = np.concatenate([self.priority, priority])
        self.atoms = np.concatenate([_padded(self.atoms, k), _padded(atoms.astype(np.int32), k)])
        self.values = np.concatenate([_padded(self.values, k), _padded(values, k)])
        self.unexplained = np.concatenate([self.unexplained, unexplained])
        if len(self.priority) > self._capacity:
            kept = np.sort(np.argsort(self.priority, kind="stable")[: self._capacity])
            self.priority, self.atoms = self.priority[kept], self.atoms[kept]
            self.values, self.unexplained = self.values[kept], self.unexplained[kept]


def _padded(x: NDArray, k: int) -> NDArray:
    return np.pad(x, ((0, 0), (0, k - x.shape[1])))
