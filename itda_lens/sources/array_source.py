"""Activations that the user has already."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit import first_nonfinite_row
from itda_lens.records import Label, Places, Provenance, at_least, checked
from itda_lens.sources.source import Listing, Rows, full_precision

SIZES = {torch.float64: (1e-140, 1e150)}
OTHER_SIZES = 1e-15, 1e17
"""The least and the most that the largest number of some activations may be: for float64, and for the
dtypes that are computed with in float32. Between them the squares of its row, and of numbers a
thousandth of it, are neither infinite nor zero."""

ONLY_HOOK = "activations"
"""The name of an array's one hook point, where its provenance names none."""


class ArraySource:
    """The rows of a tensor.

    Args:
        activations: one activation a row, any floating dtype.
        labels: where each row came from: `Places`, `Label`s or (row, chunk, position) triples; default:
            row i is labelled row=i.
        batch_size: rows of a batch.
        provenance: what is known of the rows.

    Raises:
        ValueError: no rows, NaN or infinite ones, labels of another number, `batch_size` below 1.
        TypeError: `activations` is no floating-point tensor, or a label is none.
    """

    @checked
    def __init__(
        self,
        activations: Float[Tensor, "n_tokens d_in"],
        labels: Sequence[Label | tuple[int, int, int]] | None = None,
        *,
        batch_size: int = 4096,
        provenance: Provenance = Provenance(),  # noqa: B008 (immutable)
    ) -> None:
        at_least(1, batch_size=batch_size)
        check_activations(activations)
        n = len(activations)
        if labels is not None and len(labels) != n:
            raise ValueError(f"labels must be one per row: {len(labels)} labels for {n} rows")
        self._activations = _summable(activations)
        self._places = Places.numbered(0, n) if labels is None else Places.of(labels)
        self._batch_size, self._provenance = batch_size, provenance
        self.hooks = [provenance.hook_name or ONLY_HOOK]
        self.n_rows = n

    @torch.no_grad()
    def rows(self, skip: int = 0) -> Iterator[Rows]:
        """The rows, `batch_size` at a time; see `ActivationSource.rows`."""
        for part in self._parts(skip):
            rows = full_precision(self._activations[part])
            yield Rows(self._places[part], {self.hooks[0]: rows})

    def rows_from(self, mark: Mapping[str, int]) -> Iterator[Rows]:
        """The rows from a batch of `listing` on."""
        return self.rows(mark["n"])

    def listing(self) -> Iterator[Listing]:
        """The places of each batch; see `Listed.listing`."""
        for part in self._parts(0):
            yield Listing(self._places[part], {"n": part.start})

    def _parts(self, skip: int) -> Iterator[slice]:
        for start in range(0, self.n_rows, self._batch_size):
            part = slice(max(start, skip), min(start + self._batch_size, self.n_rows))
            if part.start < part.stop:
                yield part

    def provenance(self, hook: str) -> Provenance:
        """The provenance that the user gave, and the number of rows."""
        known = self._provenance
        return replace(known, batch_size=self._batch_size, n_tokens=self.n_rows)


@checked
def check_activations(activations: Float[Tensor, "n_tokens d_in"]) -> None:
    """Refuse activations that nothing can be made from.

    Raises:
        ValueError: no rows or no numbers in them; NaN or infinite ones; or such large or small ones that
            their squares overflow or vanish.
    """
    activations = _summable(activations)
    if activations.shape[1] < 1:
        raise ValueError(f"activations must have shape [n_tokens, d_in], got {tuple(activations.shape)}")
    if len(activations) == 0:
        raise ValueError("activations must have at least one row, got none")
    row = first_nonfinite_row(activations)
    if row is not None:
        raise ValueError(f"activations must be finite, but row {row} has NaN or infinite values")
    sizes = activations.detach().abs().amax(dim=-1)
    least, most = SIZES.get(activations.dtype, OTHER_SIZES)
    if (largest := sizes.max().item()) and not least <= largest <= most:
        raise ValueError(
            f"activations must be between {least:.0e} and {most:.0e} in size, so that their squares can "
            f"be computed, but the largest is {largest:.3g}, in row {int(sizes.argmax())}; multiply all "
            "by one number"
        )


def _summable(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The rows; in float32 if they are float8, with which torch does not compute."""
    return x.float() if x.element_size() == 1 else x
