"""The interface between sources of activations and the code that uses them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from itda_lens.pursuit import first_nonfinite_row
from itda_lens.records import Places, Provenance, checked


class Rows(NamedTuple):
    """Activations of some tokens, or of whatever else a source reads.

    Attributes:
        places: where each row came from.
        values: the rows at each hook point, at least float32, all in the order of `places`.
    """

    places: Places
    values: Mapping[str, Float[Tensor, "n width"]]

    @classmethod
    def of(cls, places: Places, values: Mapping[str, Float[Tensor, "n width"]]) -> "Rows":
        """Rows as every source must give them: in float32 or float64, one for each place, and finite.

        Args:
            places: where each row came from.
            values: the rows at each hook point, in any floating dtype.

        Raises:
            ValueError: a hook point has another number of rows than there are places, or a row has NaN
                or infinite values; the message names the hook point and the place.
        """
        checked = {}
        for hook, activations in values.items():
            if activations.ndim != 2 or len(activations) != len(places):
                raise ValueError(
                    f"the rows at {hook!r} must have shape [{len(places)}, width], one for each place, "
                    f"got {tuple(activations.shape)}"
                )
            checked[hook] = x = full_precision(activations)
            bad = first_nonfinite_row(x)
            if bad is not None:
                raise ValueError(f"NaN or infinite activation at {hook!r}, {places[bad]}")
        return cls(places, checked)


@runtime_checkable
class ActivationSource(Protocol):
    """Where activations come from: a stream of rows that is the same each time it is read.

    Attributes:
        hooks: the names of its hook points; at least one.
        n_rows: rows that it will give, at most; None if it does not know.
    """

    @property
    def hooks(self) -> Sequence[str]: ...

    @property
    def n_rows(self) -> int | None: ...

    def rows(self, skip: int = 0) -> Iterator[Rows]:
        """The rows, in batches.

        Args:
            skip: rows to leave out at the beginning, for work that goes on where it stopped. The rows
                that follow are those of a reading from the start, bit for bit on a CPU.

        Raises:
            ValueError: there is no row, or one has NaN or infinite values.
        """
        ...

    def provenance(self, hook: str) -> Provenance:
        """The known facts about the rows at a hook point; complete once all have been read."""
        ...


class Listing(NamedTuple):
    """A batch of a source before its activations are computed.

    Attributes:
        places: where its rows come from.
        mark: plain data for JSON from which `Listed.rows_from` goes on with this batch.
    """

    places: Places
    mark: dict[str, int]


@runtime_checkable
class Listed(ActivationSource, Protocol):
    """A source that can tell its places at little cost, and go on from any of its batches.

    Work on such a source can be planned, split among processes and stopped (`itda_lens.plan`).
    """

    def listing(self) -> Iterator[Listing]:
        """The batches of `rows()`, without their activations. `provenance` is complete after it.

        Raises:
            ValueError: there is no row.
        """
        ...

    def rows_from(self, mark: Mapping[str, int]) -> Iterator[Rows]:
        """The batches of `rows()` from the one with this mark on, bit for bit on a CPU.

        Raises:
            ValueError: there are no rows from there on, or one has NaN or infinite values.
        """
        ...


class Activations(NamedTuple):
    """Activations at one hook point, held in memory.

    Attributes:
        values: one activation a row, at least float32.
        labels: where each row came from.
    """

    values: Float[Tensor, "n_tokens d_in"]
    labels: Places


@checked
def gathered(source: ActivationSource, progress: bool = False) -> dict[str, Activations]:
    """All rows of a source, by hook point, held in memory.

    Raises:
        ValueError: as `source.rows`.
    """
    places: list[Places] = []
    values: dict[str, list[Tensor]] = {hook: [] for hook in source.hooks}
    with tqdm(
        total=source.n_rows, unit="tok", unit_scale=True, desc="collecting", disable=not progress
    ) as bar:
        for rows in source.rows():
            places.append(rows.places)
            for hook, x in rows.values.items():
                values[hook].append(x)
            bar.update(len(rows.places))
    everywhere = Places.joined(places)
    return {hook: Activations(torch.cat(parts), everywhere) for hook, parts in values.items()}


def full_precision(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The rows in float32, or in float64 if they have it: pursuits and samples work in these."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
