"""Uniform samples of a stream, in memory that does not grow with it, whatever its batches."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from itda_lens.dictionary.labels import Label
from itda_lens.dictionary.rows import RowStore


class StreamSample:
    """The `capacity` rows of a stream that have the smallest random priorities.

    Priorities are drawn per row of the stream, so the sample depends neither on how the stream is cut
    into batches nor on the rows' width: dictionaries of different models choose among the same tokens.
    With `distinct=True` equal rows (by a 64-bit hash of their bytes) count as one, the occurrence of
    smallest priority: a row that comes a thousand times is a thousand times as likely to be in the
    sample, but takes one place.
    """

    def __init__(
        self, d: int, capacity: int, seed: int, dtype: torch.dtype, device: torch.device, distinct: bool
    ) -> None:
        self._store = RowStore(d, dtype, device, limit=capacity)
        self._priorities = np.empty(0, dtype=np.uint64)
        self._seen_at = np.empty(0, dtype=np.int64)
        # Nothing but priorities is drawn from it: models of any width sample the same rows of a stream.
        self._generator = np.random.Generator(np.random.Philox(seed))
        self._distinct = distinct
        self._identities = np.empty(0, dtype=np.uint64)
        # Odd multipliers of the row's 32-bit pieces; a sum of products modulo 2**64.
        odd = np.random.default_rng(seed).integers(0, 2**63, d * dtype.itemsize // 4, dtype=np.uint64)
        odd = odd * 2 + 1
        self._multipliers = torch.from_numpy(odd.view(np.int64)).to(device)
        self.n_seen = 0

    def __len__(self) -> int:
        return len(self._store)

    def update(self, rows: Float[Tensor, "m d"], labels: Sequence[Label] | None = None) -> None:
        """Show the sample the next rows of the stream; only rows that it keeps read their label.

        A sample is of rows with labels or of rows without.
        """
        priorities = self._generator.integers(0, 2**64, len(rows), dtype=np.uint64)
        offered = np.arange(len(rows))
        if self._store.room == 0:  # a full sample has smaller priorities than most of what comes
            offered = np.flatnonzero(priorities < self._priorities.max())
        priorities, seen_at = priorities[offered], self.n_seen + offered
        self.n_seen += len(rows)
        if not len(offered):
            return
        if len(offered) < len(rows):
            rows = rows[torch.from_numpy(offered).to(rows.device)]
        identities = self._hash(rows) if self._distinct else seen_at.view(np.uint64)

        held = len(self)
        order = np.argsort(np.concatenate([self._priorities, priorities]), kind="stable")
        if self._distinct:  # of each identity the first in this order
            _, first = np.unique(
                np.concatenate([self._identities, identities])[order], return_index=True
            )
            order = order[np.sort(first)]
        stays = np.zeros(held + len(priorities), dtype=bool)
        stays[order[: held + self._store.room]] = True
        evicted, incoming = np.flatnonzero(~stays[:held]), np.flatnonzero(stays[held:])
        if not len(incoming):
            return
        n_replaced = len(evicted)
        picked = rows[torch.from_numpy(incoming).to(rows.device)]
        picked_labels = [] if labels is None else [labels[int(i)] for i in offered[incoming]]
        self._store.replace(evicted.tolist(), picked[:n_replaced], picked_labels[:n_replaced])
        self._store.append(picked[n_replaced:], picked_labels[n_replaced:])
        slots = np.concatenate([evicted, np.arange(held, len(self))])
        for name, values in (
            ("_priorities", priorities),
            ("_seen_at", seen_at),
            ("_identities", identities),
        ):
            column = np.resize(getattr(self, name), len(self))
            column[slots] = values[incoming]
            setattr(self, name, column)

    def rows(self, at_most: int | None = None) -> Float[Tensor, "n d"]:
        """The sampled rows, in the order of the stream.

        At most `at_most` of them: those that a sample of this capacity would hold.
        """
        return self._store.rows[self._order(at_most)]

    def labels(self, at_most: int | None = None) -> list[Label]:
        """Their labels, in the same order."""
        return [self._store.labels[i] for i in self._order(at_most).tolist()]

    @property
    def held(self) -> Float[Tensor, "n d"]:
        """A view of the rows held so far, in no particular order; valid until the next update."""
        return self._store.rows

    def _order(self, at_most: int | None = None) -> Int[Tensor, " n"]:
        smallest = np.argsort(self._priorities, kind="stable")[:at_most]
        return torch.from_numpy(smallest[np.argsort(self._seen_at[smallest])])

    def _hash(self, rows: Tensor) -> np.ndarray:
        pieces = rows.contiguous().view(torch.int32)  # rows are float32 or float64
        digest = torch.cat(
            [_mix(part.long() * self._multipliers).sum(dim=-1) for part in pieces.split(1024)]
            or [torch.empty(0, dtype=torch.long)]
        )
        return digest.cpu().numpy().view(np.uint64)


def _mix(products: Int[Tensor, "m p"]) -> Int[Tensor, "m p"]:
    """Spread the high bits over the low ones: numbers of few digits end in zeros, and so do products."""
    return products ^ (products >> 32)
