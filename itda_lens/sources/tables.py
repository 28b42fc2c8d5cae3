"""Columns of tables as batches of rows: parquet files, and data sets of the library `datasets`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from itda_lens.sources.row_labels import Names

ROWS = 4096
"""Rows of a table that are read at a time."""

FEW = 12
"""Column names that a message lists."""


class Table:
    """The activations and labels of a table, batch by batch, as often as it is read.

    Args:
        batches: a function that opens the table and gives Arrow tables or record batches.
        schema: the table's Arrow schema; None if it is known only once a batch is there.
        column: the column of the activations, each a list of numbers; default: the only such column.
        labels: the column of the labels; None for no labels.
        classes: names of the numbers in the column of the labels; None for no names.
        n_rows: the number of rows; None if it is not known.

    Raises:
        ValueError: a column is missing or of another kind, or several could be meant.
    """

    def __init__(
        self,
        batches: Callable[[], Iterator[Any]],
        schema: Any,
        column: str | None,
        labels: str | None,
        classes: list[str] | None = None,
        n_rows: int | None = None,
    ) -> None:
        self._batches, self._column, self._labels, self._classes = batches, column, labels, classes
        self.n_rows = n_rows
        if schema is not None:
            self._columns(schema)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Names | None]]:
        n = 0
        for batch in self._batches():
            column, labels = self._columns(batch.schema)
            values = _vectors(batch.column(column), n)
            names = None if labels is None else self._names(batch.column(labels))
            n += len(values)
            if len(values):
                yield values, names

    def _columns(self, schema: Any) -> tuple[str, str | None]:
        import pyarrow

        def is_vector(kind: Any) -> bool:
            return _is_list(kind) and pyarrow.types.is_floating(kind.value_type)

        found = [field.name for field in schema if is_vector(field.type)]
        if self._column is not None and self._column not in schema.names:
            raise ValueError(f"column must be one of {_few(schema.names)}, got {self._column!r}")
        if self._column is not None and self._column not in found:
            raise ValueError(
                f"column must name a column of lists of floating-point numbers, one a row, but "
                f"{self._column!r} holds {schema.field(self._column).type}"
            )
        if self._column is None and len(found) != 1:
            raise ValueError(
                f"column must name the column that holds the activations: {len(found)} columns hold "
                f"lists of floating-point numbers{': ' + _few(found) if found else ''}, of "
                f"{_few(schema.names)}"
            )
        if self._labels is not None and self._labels not in schema.names:
            raise ValueError(
                f"labels must be one of the columns {_few(schema.names)}, got {self._labels!r}"
            )
        if self._labels is not None:
            kind = schema.field(self._labels).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            types = pyarrow.types
            text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
            if not (text or types.is_integer(kind) or types.is_boolean(kind)):
                raise ValueError(
                    f"labels must name a column of strings or whole numbers, but {self._labels!r} holds "
                    f"{kind}"
                )
        return self._column or found[0], self._labels

    def _names(self, column: Any) -> Names:
        values = column.to_pylist()
        if self._classes is not None:
            classes = self._classes
            values = [None if i is None or i < 0 else classes[i] for i in values]
        return Names([None if value is None else str(value) for value in values])


def parquet_table(path: Path, column: str | None, labels: str | None) -> Table:
    """A column of a parquet file.

    Raises:
        ValueError: the file is no parquet file, or as `Table`.
        FileNotFoundError: there is no such file.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema, n_rows = file.schema_arrow, file.metadata.num_rows
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"activations must be a parquet file, but {path} is none: {error}") from error

    def batches() -> Iterator[Any]:
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(ROWS, columns=[name for name in (used, labels) if name])

    table = Table(batches, schema, column, labels, n_rows=n_rows)
    used, _ = table._columns(schema)
    return table


def data_set_table(data_set: Any, column: str | None, labels: str | None) -> Table:
    """A column of a `datasets.Dataset` or `IterableDataset`, by its Arrow tables.

    Raises:
        ValueError: as `Table`.
    """
    arrow = data_set.with_format("arrow")
    features = data_set.features
    classes = getattr(features.get(labels), "names", None) if features and labels else None
    n_rows = len(data_set) if hasattr(data_set, "__len__") else None

    def batches() -> Iterator[Any]:
        return iter(arrow.iter(batch_size=ROWS))

    schema = features.arrow_schema if features else None
    return Table(batches, schema, column, labels, classes, n_rows)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _vectors(column: Any, first: int) -> np.ndarray:
    """A column of lists of numbers as one array [n, d].

    Args:
        first: the number of its first row, for messages.

    Raises:
        ValueError: a row is missing, or has a missing number or another width than the first.
    """
    import pyarrow
    from pyarrow import compute

    array = column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column
    if isinstance(array, pyarrow.ChunkedArray):  # of no chunks, or too long for one
        array = pyarrow.concat_arrays(array.chunks)
    if not len(array):
        return np.empty((0, 1), dtype=np.float32)
    if array.null_count:
        bad = first + int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"activations must be there in each row, but row {bad} has none")
    numbers = array.flatten()
    lengths = compute.call_function("list_value_length", [array])
    widths = lengths.to_numpy(zero_copy_only=False)
    width = int(widths[0])
    other = np.flatnonzero(widths != width)
    if len(other):
        raise ValueError(
            f"activations must have one width, but row {first + int(other[0])} has "
            f"{int(widths[other[0]])} numbers, and row {first} has {width}"
        )
    if numbers.null_count:
        at = int(np.flatnonzero(numbers.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"activations must be finite, but row {first + at // width} lacks a number")
    return numbers.to_numpy(zero_copy_only=False).reshape(len(array), width)


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:FEW])) + (", ..." if len(names) > FEW else "")
