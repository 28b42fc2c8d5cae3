"""The one door by which activations of any form come in."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itda_lens.records import Provenance, at_least, checked
from itda_lens.sources.array_source import ArraySource, is_array
from itda_lens.sources.batch_source import BatchSource, loader_source
from itda_lens.sources.source import ActivationSource
from itda_lens.sources.tables import Table, data_set_table, parquet_table

FILES = (".npy", ".safetensors", ".parquet")
"""Suffixes of files with activations that are read."""


@checked
def as_source(
    activations: Any,
    labels: Any = None,
    *,
    item: str | None = None,
    column: str | None = None,
    batch_size: int = 4096,
    provenance: Provenance = Provenance(),  # noqa: B008 (immutable)
) -> ActivationSource:
    """The source that reads activations of any form. Only one batch of them is held at a time.

    Args:
        activations: one of

            - a tensor, a numpy array or memory map, or another array whose slices numpy reads (h5py,
              zarr);
            - the path of a `.npy`, `.safetensors` or `.parquet` file;
            - a `datasets.Dataset` or `IterableDataset`, or a column of one;
            - a torch DataLoader, of tensors, of (tensor, labels) pairs or of dicts;
            - a list, iterator or generator of batches [n, d_in] or rows [d_in], each alone, with its
              labels as a pair, or in a dict. An iterator can be read once, which is enough for
              `fit` with every preset;
            - a source, which is returned as it is.
        labels: where each row came from: strings or whole numbers that name the rows, `Label`s, (row,
            chunk, position) triples, or `Places`; or the name of a column (in a `.safetensors` file, of
            a tensor) that holds strings or whole numbers. Default: row i is labelled row=i.
        item: the kind of thing that a row is, such as "image"; default: "row".
        column: the column, key or tensor that holds the activations; default: the only one that can.
        batch_size: rows of a batch of the source.
        provenance: what is known of the rows.

    Raises:
        ValueError: there are no rows, or the shape, the column, the labels or the file is wrong; rows of
            an array in memory are NaN or infinite. Rows of other forms are checked while they are read.
        TypeError: `activations` is of no such form or not of floating-point numbers; a label is none.
        FileNotFoundError: there is no such file.
    """
    at_least(1, batch_size=batch_size)
    options: dict[str, Any] = dict(item=item, batch_size=batch_size, provenance=provenance)
    if isinstance(activations, ActivationSource):
        for name, value in (("labels", labels), ("item", item), ("column", column)):
            if value is not None:
                raise ValueError(
                    f"{name} must be left out, since a source says it itself; got {value!r:.80}"
                )
        return activations
    if isinstance(activations, str | Path):
        return _from_file(Path(activations), labels, column, options)
    if table := _table(activations, labels, column):
        given = None if isinstance(labels, str) else labels
        return BatchSource(table, given, n_rows=table.n_rows, **options)
    if is_array(activations) and not hasattr(activations, "column_names"):
        return _from_array(activations, labels, column, options)
    if isinstance(activations, torch.utils.data.DataLoader):
        return loader_source(activations, labels, column=column, **options)
    if isinstance(activations, torch.utils.data.Dataset) and hasattr(activations, "__len__"):
        items = _Items(activations)
        return BatchSource(items, labels, column=column, n_rows=len(items), **options)
    if isinstance(activations, Mapping):
        raise TypeError(
            f"activations must be one table or array, got {type(activations).__name__} of "
            f"{', '.join(map(repr, list(activations)[:12]))}; give one of these"
        )
    if hasattr(activations, "iterrows") or hasattr(activations, "iter_rows"):  # of pandas, of polars
        raise TypeError(
            f"activations must be rows of numbers, got a {type(activations).__name__}; give "
            "table[columns].to_numpy(), or np.stack of a column of lists"
        )
    if isinstance(activations, Iterable) and not isinstance(activations, bytes | set | frozenset):
        return BatchSource(activations, labels, column=column, **options)
    raise TypeError(
        "activations must be a floating-point tensor or array, a file, a table, a DataLoader or batches "
        f"of rows, got {activations!r:.80}"
    )


def _from_array(
    activations: Any, labels: Any, column: str | None, options: dict[str, Any]
) -> ArraySource:
    if column is not None:
        raise ValueError(
            f"column goes with tables and dicts, but activations are an array; got {column!r}"
        )
    return ArraySource(activations, labels, **options)


def _from_file(path: Path, labels: Any, column: str | None, options: dict[str, Any]) -> ActivationSource:
    if path.suffix.lower() not in FILES:
        raise ValueError(
            f"activations must be a file that ends in {', '.join(FILES)}, or an array, got {str(path)!r}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"activations must be a file, but there is none at {str(path)!r}")
    if path.suffix.lower() == ".parquet":
        table = parquet_table(path, column, labels if isinstance(labels, str) else None)
        given = None if isinstance(labels, str) else labels
        return BatchSource(table, given, n_rows=table.n_rows, **options)
    if path.suffix.lower() == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(
                f"activations must be an array, but {path} holds none that is read: {error}"
            ) from error
        return _from_array(array, labels, column, options)
    tensors = _SafetensorsFile(path)
    if isinstance(labels, str):
        labels = tensors.labels(labels)
    return ArraySource(tensors.array(column), labels, **options)


def _table(activations: Any, labels: Any, column: str | None) -> Table | None:
    """The table, if it is a data set or a column of one that has no transform of the user's."""
    if type(activations).__module__.split(".")[0] != "datasets":
        return None
    name = labels if isinstance(labels, str) else None
    inner = getattr(activations, "source", None)
    if type(activations).__name__ in ("Column", "IterableColumn") and hasattr(inner, "with_format"):
        if column is not None:
            raise ValueError(f"column goes with a data set, not with a column of one; got {column!r}")
        activations, column = inner, activations.column_name
    if not hasattr(activations, "with_format") or isinstance(activations, Mapping):
        return None
    if getattr(activations, "_format_type", None) == "custom":
        return None
    return data_set_table(activations, column, name)


class _Items:
    """The items of a map-style data set, as often as they are read."""

    def __init__(self, data_set: Any) -> None:
        self._data_set = data_set

    def __len__(self) -> int:
        return len(self._data_set)

    def __iter__(self) -> Iterator[Any]:
        return (self._data_set[i] for i in range(len(self)))


class _SafetensorsFile:
    """Tensors of a file, of which slices are read."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._path = path
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"activations must be a file of tensors, but {path} is none: {error}"
            ) from error
        self._names = list(self._file.keys())

    def array(self, name: str | None) -> "_Slices":
        found = [key for key in self._names if len(self._file.get_slice(key).get_shape()) == 2]
        if name is None and len(found) != 1:
            raise ValueError(
                f"column must name the tensor that holds the activations: {self._path} has "
                f"{len(found)} with rows, of {', '.join(map(repr, self._names))}"
            )
        if name is not None and name not in self._names:
            raise ValueError(f"column must be one of {', '.join(map(repr, self._names))}, got {name!r}")
        return _Slices(self._file.get_slice(name or found[0]))

    def labels(self, name: str) -> Tensor:
        if name not in self._names:
            raise ValueError(f"labels must be one of {', '.join(map(repr, self._names))}, got {name!r}")
        return self._file.get_tensor(name)


class _Slices:
    """A tensor of a safetensors file as an array whose slices are read."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.shape, self.dtype = tuple(inner.get_shape()), inner.get_dtype()

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def __getitem__(self, part: slice) -> Tensor:
        return self._inner[part]
