"""Uniform samples of a stream, whatever its order and batches, in memory that does not grow."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int, UInt64
from torch import Tensor

from itda_lens.dictionary.rows import RowStore
from itda_lens.records import Places, mix64

NO_BOUND = 2**64 - 1
"""The bound of a sample that any row may enter: the largest priority."""


class PriorityBound:
    """The largest priority that a row can have and still be in a sample, from the places alone.

    Where equal rows count as one, more places than the capacity may be needed, which only the
    activations can tell. So the bound leaves room for more, and the sample knows whether that was enough
    (`StreamSample.check_whole`).

    Args:
        capacity, seed, distinct: those of the sample.
        spare: room for more places where equal rows count as one, as a share of the capacity.
    """

    def __init__(self, capacity: int, seed: int, *, distinct: bool, spare: float) -> None:
        self._capacity = capacity + int(spare * capacity) if distinct else capacity
        self._salt, self._distinct = _salt(seed), distinct
        self._smallest = np.empty(0, dtype=np.uint64)

    def update(self, places: Places) -> None:
        """Show more places of the stream."""
        both = np.concatenate([self._smallest, mix64(places.identity ^ self._salt)])
        if self._distinct:  # a text that comes again has its places again
            both = np.unique(both)
        if len(both) > self._capacity:
            both = np.partition(both, self._capacity - 1)[: self._capacity]
        self._smallest = both

    def value(self) -> int:
        """The bound, or `NO_BOUND` if all rows shown so far can enter."""
        full = len(self._smallest) == self._capacity
        return int(self._smallest.max()) if full else NO_BOUND


class StreamSample:
    """The `capacity` rows of a stream that have the smallest random priorities.

    A row's priority is a hash of the seed and of the place that it came from (`Places.identity`), not of
    its number in the stream, its batch or its content. So the sample is the same in whatever order and
    batches the rows come, samples of parts of a stream merge into that of the whole, and dictionaries of
    other models, tokenizers and context sizes choose among the same places. Equal priorities go by the
    order of the stream: row, chunk, position.

    With `distinct=True` equal rows (by a 64-bit hash of their bytes) count as one, the occurrence of
    smallest priority: a row that comes a thousand times is a thousand times as likely to be in the
    sample, but takes one place.

    Args:
        d: numbers in a row.
        capacity: rows that are kept, at most.
        seed: another seed draws another sample.
        dtype, device: of the rows: float32 or float64.
        distinct: see above.
        labelled: whether the sample keeps texts, from which labels quote.
    """

    def __init__(
        self, d: int, capacity: int, seed: int, dtype: torch.dtype, device: torch.device,
        *, distinct: bool, labelled: bool,
    ) -> None:  # fmt: skip
        self._store = RowStore(d, dtype, device, limit=capacity)
        self._places = Places.numbered(0, 0)
        self._priorities = np.empty(0, dtype=np.uint64)
        self._identities = np.empty(0, dtype=np.uint64)
        self._capacity, self._seed, self._salt = capacity, seed, _salt(seed)
        self._bound, self._n_beyond = NO_BOUND, 0
        self._distinct, self._labelled = distinct, labelled
        # Odd multipliers of the row's 32-bit pieces; a sum of products modulo 2**64. They must not
        # depend on the seed, since samples of one stream are merged by these hashes.
        odd = np.random.default_rng(0).integers(0, 2**63, d * dtype.itemsize // 4, dtype=np.uint64)
        odd = odd * 2 + 1
        self._multipliers = torch.from_numpy(odd.view(np.int64)).to(device)
        self.n_seen = 0

    def __len__(self) -> int:
        return len(self._store)

    def bound(self, spare: float) -> PriorityBound:
        """A fresh bound for this sample, to be shown all places of the stream."""
        return PriorityBound(self._capacity, self._seed, distinct=self._distinct, spare=spare)

    def limit(self, bound: int) -> None:
        """Take in no row of a larger priority from now on: the value of a `PriorityBound`."""
        self._bound = bound

    def check_whole(self) -> None:
        """Refuse a sample that lacks rows because of its bound.

        Raises:
            ValueError: equal rows counted as one so often that rows beyond the bound are needed.
        """
        if self._n_beyond and len(self) < self._capacity:
            raise ValueError(
                f"spare must be larger: so many activations are equal that a sample of "
                f"{self._capacity} different ones got {len(self)}"
            )

    def update(self, rows: Float[Tensor, "m d"], places: Places) -> None:
        """Show the sample more rows of the stream, and the place of each."""
        priorities = mix64(places.identity ^ self._salt)
        self.n_seen += len(rows)
        most = self._bound
        if self._store.room == 0 and len(self):
            # Most new rows have larger priorities than all rows of a full sample.
            most = min(most, int(self._priorities.max()))
        offered = np.flatnonzero(priorities <= np.uint64(most))
        self._n_beyond += int((priorities > np.uint64(self._bound)).sum())
        if not len(offered):
            return
        rows = rows[torch.from_numpy(offered).to(rows.device)]
        identities = self._hash(rows) if self._distinct else np.zeros(len(rows), dtype=np.uint64)
        self._admit(rows, places.take(offered), priorities[offered], identities)

    def merge(self, other: "StreamSample") -> None:
        """Take in a sample of another part of the stream, of the same seed and settings."""
        self.n_seen += other.n_seen
        self._n_beyond += other._n_beyond
        self._admit(other._store.rows, other._places, other._priorities, other._identities)

    def state(self) -> dict[str, Tensor]:
        """All of it, as tensors; `load` of a sample of the same settings takes it back."""
        columns = {"priorities": self._priorities, "identities": self._identities}
        return {
            "n_seen": torch.tensor(self.n_seen, device="cpu"),
            "n_beyond": torch.tensor(self._n_beyond, device="cpu"),
            "rows": self._store.rows.cpu().clone(),
            **{name: torch.from_numpy(column.view(np.int64)) for name, column in columns.items()},
            **{f"places.{name}": torch.from_numpy(part) for name, part in self._places.state().items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Become the sample that gave this state. It must be empty."""
        assert len(self) == 0, "a state is loaded into an empty sample"
        self.n_seen, self._n_beyond = int(state["n_seen"]), int(state["n_beyond"])
        self._store.append(state["rows"].to(self._store.rows))
        self._priorities = state["priorities"].numpy().view(np.uint64)
        self._identities = state["identities"].numpy().view(np.uint64)
        self._places = Places.restored(
            {
                name.removeprefix("places."): part.numpy()
                for name, part in state.items()
                if name.startswith("places.")
            }
        )

    def rows(self, at_most: int | None = None) -> Float[Tensor, "n d"]:
        """The sampled rows, in the order of the stream.

        At most `at_most` of them: those that a sample of this capacity would hold.
        """
        order = torch.from_numpy(self._order(at_most))
        return self._store.rows[order.to(self._store.rows.device)]

    def places(self, at_most: int | None = None) -> Places:
        """The places of the sampled rows, in the order of `rows`."""
        return self._places.take(self._order(at_most))

    @property
    def held(self) -> Float[Tensor, "n d"]:
        """A view of the rows held so far, in no particular order; valid until the next update."""
        return self._store.rows

    def _admit(
        self,
        rows: Float[Tensor, "m d"],
        places: Places,
        priorities: UInt64[np.ndarray, " m"],
        identities: UInt64[np.ndarray, " m"],
    ) -> None:
        """Keep the rows of smallest priority, among those held and the new ones."""
        held, room = len(self), self._store.room
        both = np.concatenate([self._priorities, priorities])
        everywhere = Places.joined([self._places, places])
        order = _by_priority(both, everywhere)
        if self._distinct:  # only the first of each identity, in this order
            _, first = np.unique(
                np.concatenate([self._identities, identities])[order], return_index=True
            )
            order = order[np.sort(first)]
        stays = np.zeros(len(both), dtype=bool)
        stays[order[: held + room]] = True
        evicted, incoming = np.flatnonzero(~stays[:held]), np.flatnonzero(stays[held:])
        if not len(incoming):
            return
        picked = rows[torch.from_numpy(incoming).to(rows.device)]
        n_replaced = len(evicted)
        self._store.replace(evicted.tolist(), picked[:n_replaced])
        self._store.append(picked[n_replaced:])
        new = places.take(incoming)
        new = new.quoting() if self._labelled else new.bare()
        slots = np.concatenate([evicted, np.arange(held, len(self))])
        source = np.arange(len(self))
        source[slots] = held + np.arange(len(incoming))
        self._places = Places.joined([self._places, new]).take(source)
        self._priorities = np.concatenate([self._priorities, priorities[incoming]])[source]
        self._identities = np.concatenate([self._identities, identities[incoming]])[source]

    def _order(self, at_most: int | None = None) -> Int[np.ndarray, " n"]:
        smallest = _by_priority(self._priorities, self._places)[:at_most]
        return smallest[self._places.take(smallest).order()]

    def _hash(self, rows: Tensor) -> np.ndarray:
        pieces = rows.contiguous().view(torch.int32)  # rows are float32 or float64
        digest = torch.cat(
            [_mix(part.long() * self._multipliers).sum(dim=-1) for part in pieces.split(1024)]
            or [torch.empty(0, dtype=torch.long, device="cpu")]
        )
        return digest.cpu().numpy().view(np.uint64)


def _by_priority(priorities: UInt64[np.ndarray, " n"], places: Places) -> Int[np.ndarray, " n"]:
    """Indices by rising priority; equal ones in the order of the stream."""
    order = np.argsort(priorities, kind="stable")
    ordered = priorities[order]
    if (ordered[1:] == ordered[:-1]).any():  # several tokens of one character, a text that comes twice
        order = np.lexsort((places.head, places.position, places.chunk, places.row, priorities))
    return order


def _salt(seed: int) -> np.uint64:
    return np.uint64(mix64(np.array(seed % 2**64, dtype=np.uint64)))


def _mix(products: Int[Tensor, "m p"]) -> Int[Tensor, "m p"]:
    """Spread the high bits over the low ones: numbers of few digits end in zeros, and so do products."""
    return products ^ (products >> 32)
