"""Activations that come in batches: from iterators, DataLoaders and tables."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itda_lens.records import Places, Provenance, at_least, checked
from itda_lens.sources.array_source import ONLY_HOOK, is_array
from itda_lens.sources.row_labels import RowLabels
from itda_lens.sources.row_tensors import RowChecks, as_rows
from itda_lens.sources.source import Rows, full_precision


class BatchSource:
    """The rows of batches, one after the other, in memory that does not grow.

    Rows are put together anew to batches of `batch_size`, so that the dictionary is that of one tensor
    with all of the rows, bit for bit, however the batches are cut. Each row is checked as it comes.

    Args:
        batches: an iterable of batches [n, d_in], or of single rows [d_in], as tensors, arrays or lists;
            of (batch, labels) pairs; or of dicts. An iterator can be read once.
        labels: labels of all rows, if the batches bring none; as in `ArraySource`. For dicts, the key of
            the labels.
        item: the kind of thing that a row is, such as "image"; default: "row".
        column: the key of the activations, for dicts.
        batch_size: rows of a batch, as this source gives it.
        n_rows: the number of rows; None if it is not known.
        provenance: what is known of the rows.

    Raises:
        ValueError: `batch_size` is below 1, or labels are of another number than rows.
        TypeError: `batches` is no iterable.
    """

    @checked
    def __init__(
        self,
        batches: Iterable[Any],
        labels: Any = None,
        *,
        item: str | None = None,
        column: str | None = None,
        batch_size: int = 4096,
        n_rows: int | None = None,
        provenance: Provenance = Provenance(),  # noqa: B008 (immutable)
    ) -> None:
        at_least(1, batch_size=batch_size)
        self._batches, self._batch_size, self._provenance = batches, batch_size, provenance
        self._column, self._key = column, labels if isinstance(labels, str) else None
        self._item, self._given = item, None if isinstance(labels, str) else labels
        self.n_rows = n_rows
        self._fresh_labels()  # refuses bad ones
        self._read_once = isinstance(batches, Iterator)
        self._was_read = False
        self._n_read: int | None = None
        self.hooks = [provenance.hook_name or ONLY_HOOK]

    @torch.no_grad()
    def rows(self, skip: int = 0) -> Iterator[Rows]:
        """The rows, `batch_size` at a time; see `ActivationSource.rows`.

        Raises:
            ValueError: as `ActivationSource.rows`; or the batches are an iterator that was read before.
        """
        if self._read_once and self._was_read:
            raise ValueError(
                "activations are an iterator, which can be read only once, and it was read already; "
                "give a list, a DataLoader or an array to read them again"
            )
        self._was_read = True
        start = 0
        for x, places in _regrouped(self._checked(), self._batch_size):
            stop = start + len(x)
            self._n_read = max(stop, self._n_read or 0)
            if stop > skip:
                new = slice(max(0, skip - start), None)
                yield Rows(places[new], {self.hooks[0]: x[new]})
            start = stop

    def provenance(self, hook: str) -> Provenance:
        """The provenance that the user gave and, once rows were read, their number."""
        n = self.n_rows if self._n_read is None else self._n_read
        return replace(self._provenance, batch_size=self._batch_size, n_tokens=n)

    def _fresh_labels(self) -> RowLabels:
        return RowLabels(self._given, self._item, self.n_rows)

    def _checked(self) -> Iterator[tuple[Tensor, Places]]:
        """The rows as they come, in full precision, with their places."""
        labels, checks, n = self._fresh_labels(), RowChecks(), 0
        for values, own in self._opened():
            x = as_rows(values)
            checks.update(x)
            places = labels.places(n, n + len(x), own)
            n += len(x)
            # A copy: a generator may fill one buffer again and again.
            yield x.to(full_precision(x[:0]).dtype, copy=True), places
        checks.finish()
        labels.check_number(n)

    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """(batch, labels) pairs; single rows are gathered to batches first."""
        rows: list[Any] = []
        names: list[Any] = []
        for item in self._batches:
            values, label = self._parts(item)
            if not _is_row(values):
                if rows:
                    yield rows, names or None
                    rows, names = [], []
                yield values, label
                continue
            rows.append(values if isinstance(values, list | tuple) else _copied(values))
            if label is not None:
                names.append(label.item() if isinstance(label, Tensor | np.generic) else label)
            if len(names) not in (0, len(rows)):
                raise ValueError(
                    f"labels must be one per row: {len(names)} labels for the last {len(rows)} rows"
                )
            if len(rows) == self._batch_size:
                yield rows, names or None
                rows, names = [], []
        if rows:
            yield rows, names or None

    def _parts(self, item: Any) -> tuple[Any, Any]:
        """The values and the labels in one item of the iterable."""
        if isinstance(item, Mapping):
            return self._field(item, self._column, "column"), (
                None if self._key is None else self._field(item, self._key, "labels")
            )
        if self._key is not None or self._column is not None:
            name = "labels" if self._key is not None else "column"
            raise ValueError(
                f"{name} can name a column of a table or a key of dicts, but the activations come as "
                f"{type(item).__name__}; got {name}={self._key or self._column!r}"
            )
        if isinstance(item, list | tuple) and 1 <= len(item) <= 2 and is_array(item[0]):
            if len(item) == 1:
                return item[0], None
            if not (_is_row(item[0]) and is_array(item[1]) and item[0].shape == item[1].shape):
                return item[0], item[1]  # else these are two rows
        if is_array(item) or isinstance(item, list | tuple):
            return item, None
        raise TypeError(
            "activations must come as batches [n, d_in], as rows [d_in], as (batch, labels) pairs or as "
            f"dicts, got {item!r:.80}"
        )

    def _field(self, item: Mapping[Any, Any], key: str | None, argument: str) -> Any:
        if key is None and len(item) == 1:
            return next(iter(item.values()))
        if key not in item:
            raise ValueError(f"{argument} must be one of {sorted(map(str, item))}, got {key!r}")
        return item[key]


def loader_source(loader: Any, labels: Any, **options: Any) -> BatchSource:
    """The rows of a torch DataLoader.

    Raises:
        ValueError: it shuffles, so that no two readings give the same rows.
    """
    from torch.utils.data import (
        IterableDataset,
        RandomSampler,
        SubsetRandomSampler,
        WeightedRandomSampler,
        default_collate,
    )

    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        raise ValueError(
            "activations must come in the same order each time, and rows are known by their number in "
            "it, but this DataLoader shuffles; make it with shuffle=False"
        )
    n_rows = None
    plain = loader.collate_fn is default_collate and not loader.drop_last
    if plain and not isinstance(loader.dataset, IterableDataset):
        n_rows = len(loader.dataset)
    return BatchSource(loader, labels, n_rows=n_rows, **options)


def _regrouped(parts: Iterable[tuple[Tensor, Places]], size: int) -> Iterator[tuple[Tensor, Places]]:
    """Rows in batches of `size`; the last may have fewer."""
    values: list[Tensor] = []
    places: list[Places] = []
    n = 0
    for x, where in parts:
        while len(x):
            take = min(size - n, len(x))
            values.append(x[:take])
            places.append(where[:take])
            n += take
            x, where = x[take:], where[take:]
            if n == size:
                yield torch.cat(values), Places.joined(places)
                values, places, n = [], [], 0
    if n:
        yield torch.cat(values), Places.joined(places)


def _is_row(values: Any) -> bool:
    if isinstance(values, list | tuple):
        return bool(values) and not isinstance(values[0], Sequence) and not is_array(values[0])
    return len(values.shape) == 1


def _copied(values: Any) -> Any:
    return values.clone() if isinstance(values, Tensor) else np.array(values)
