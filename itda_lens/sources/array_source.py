"""Activations that the user has already, as an array in memory or on a disk."""

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itda_lens.records import Provenance, at_least, checked
from itda_lens.sources.row_labels import RowLabels
from itda_lens.sources.row_tensors import CHECKED_AT_ONCE, RowChecks, as_rows, check_layout
from itda_lens.sources.source import Listing, Rows, full_precision

ONLY_HOOK = "activations"
"""The name of an array's one hook point, where its provenance names none."""


class ArraySource:
    """The rows of a tensor or array.

    An array in memory is checked on construction. An array on a disk (a numpy memory map, an h5py or
    zarr array) is checked while it is read, and never held as a whole.

    Args:
        activations: one activation a row, any floating dtype: a tensor, a numpy array, or an array whose
            slices numpy reads.
        labels: where each row came from: strings or numbers that name the rows, `Label`s, (row, chunk,
            position) triples, or `Places`; default: row i is labelled row=i.
        item: the kind of thing that a row is, such as "image"; default: "row".
        batch_size: rows of a batch.
        provenance: what is known of the rows.

    Raises:
        ValueError: no rows, NaN or infinite ones, labels of another number, `batch_size` below 1.
        TypeError: `activations` has no floating-point numbers, or a label is none.
    """

    @checked
    def __init__(
        self,
        activations: Any,
        labels: Any = None,
        *,
        item: str | None = None,
        batch_size: int = 4096,
        provenance: Provenance = Provenance(),  # noqa: B008 (immutable)
    ) -> None:
        at_least(1, batch_size=batch_size)
        if not is_array(activations):
            raise TypeError(
                f"activations must be a floating-point tensor or array, got {type(activations).__name__}"
            )
        self._activations = activations
        check_layout(activations)
        if len(shape := tuple(activations.shape)) != 2:
            raise ValueError(f"activations must have shape [n_tokens, d_in], got {shape}")
        as_rows(activations[:1])  # its width and dtype
        self.n_rows = len(activations)
        self._on_disk = _is_on_disk(activations)
        if not self._on_disk:
            self._check()
        self._labels = RowLabels(labels, item, self.n_rows)
        self._batch_size, self._provenance = batch_size, provenance
        self.hooks = [provenance.hook_name or ONLY_HOOK]

    @torch.no_grad()
    def rows(self, skip: int = 0) -> Iterator[Rows]:
        """The rows, `batch_size` at a time; see `ActivationSource.rows`."""
        checks = None
        for part in self._parts(skip):
            x = as_rows(self._activations[part])
            if self._on_disk:
                checks = checks or RowChecks(first=part.start)
                checks.update(x)
            places = self._labels.places(part.start, part.stop)
            yield Rows(places, {self.hooks[0]: full_precision(x)})
        if checks is not None and not skip:
            checks.finish()

    def rows_from(self, mark: Mapping[str, int]) -> Iterator[Rows]:
        """The rows from a batch of `listing` on."""
        return self.rows(mark["n"])

    def listing(self) -> Iterator[Listing]:
        """The places of each batch; see `Listed.listing`."""
        for part in self._parts(0):
            yield Listing(self._labels.places(part.start, part.stop), {"n": part.start})

    def _parts(self, skip: int) -> Iterator[slice]:
        for start in range(0, self.n_rows, self._batch_size):
            part = slice(max(start, skip), min(start + self._batch_size, self.n_rows))
            if part.start < part.stop:
                yield part

    def provenance(self, hook: str) -> Provenance:
        """The provenance that the user gave, and the number of rows."""
        return replace(self._provenance, batch_size=self._batch_size, n_tokens=self.n_rows)

    def _check(self) -> None:
        checks = RowChecks()
        for start in range(0, self.n_rows, CHECKED_AT_ONCE):
            checks.update(as_rows(self._activations[start : start + CHECKED_AT_ONCE]))
        checks.finish()


def is_array(values: Any) -> bool:
    """Whether it is one array, of which slices can be read: of torch, numpy, h5py, zarr or JAX."""
    return all(hasattr(values, name) for name in ("shape", "dtype", "__getitem__")) and not isinstance(
        values, type
    )


def _is_on_disk(values: Any) -> bool:
    if isinstance(values, Tensor):
        return False
    if not isinstance(values, np.ndarray):
        return True
    while isinstance(values, np.ndarray):  # views have their array as base
        if isinstance(values, np.memmap) or isinstance(values.base, mmap.mmap):
            return True
        values = values.base
    return False
