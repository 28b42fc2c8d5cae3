"""A run at one hook point: the rule's selector, and the rows on which a threshold is calibrated."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.dictionary import (
    Dictionary,
    Foreseeing,
    PriorityBound,
    Resumable,
    Sated,
    Selector,
    StreamSample,
    assign_folds,
)
from itda_lens.pursuit import Coding, calibrate_out_of_fold, unexplained_out_of_fold
from itda_lens.records import Places
from itda_lens.training.recipe import Recipe

CALIBRATION_ROWS = 2048
"""Activations on which a threshold is calibrated, and the usual residual measured. The error of their
mean L0 is a 45th of the standard deviation of L0."""

QUANTILES = 101
"""Quantiles of the residual that are recorded: the least, each per cent, the largest."""

CALIBRATION_SEED = 3
"""Added to a recipe's seed, so that the calibration's sample shares no priorities with those of a
rule."""


_SELECTOR, _SAMPLE = "selector.", "calibration."


class Finished(NamedTuple):
    """The outcome of a run at one hook point.

    Attributes:
        dictionary: atoms, mean and labels.
        threshold: of its codes.
        unexplained: the quantiles for `Provenance.unexplained`; None where no texts could be held out.
    """

    dictionary: Dictionary
    threshold: float
    unexplained: list[float] | None


class Point:
    """The run at one hook point: the rule's selector, and a sample of rows.

    On the sample a threshold is calibrated, and the usual residual is measured. It belongs to the run,
    not to the rule, so that every rule has both.
    """

    def __init__(self, recipe: Recipe, d_in: int, dtype: torch.dtype, device: torch.device) -> None:
        self.selector: Selector = recipe.rule.selector(
            recipe.request(d_in=d_in, dtype=dtype, device=device)
        )
        self.stream = (d_in, str(dtype).removeprefix("torch."))
        """Width and dtype of the rows, as plain data."""
        self._recipe = recipe
        seed = recipe.seed + CALIBRATION_SEED
        self._sample = StreamSample(
            d_in, CALIBRATION_ROWS, seed, dtype, device, distinct=False, labelled=False
        )

    @classmethod
    def for_rows(cls, recipe: Recipe, x: Float[Tensor, "n d_in"]) -> "Point":
        """A fresh run for a stream of rows like these."""
        return cls(recipe, x.shape[1], x.dtype, x.device)

    @property
    def done(self) -> bool:
        return isinstance(self.selector, Sated) and self.selector.done

    def update(self, x: Float[Tensor, "n d_in"], places: Places) -> None:
        """See more rows."""
        self.selector.update(x, places)
        self._sample.update(x, places)

    def bounds(self, spare: float) -> list[PriorityBound]:
        """Fresh bounds of all samples; none if the rule cannot tell which rows it will look at."""
        if not isinstance(self.selector, Foreseeing):
            return []
        return [*self.selector.bounds(spare), self._sample.bound(spare)]

    def limit(self, bounds: Sequence[int]) -> None:
        """Pass over rows beyond these values of `bounds`."""
        if not bounds:
            return
        assert isinstance(self.selector, Foreseeing), "only such a selector has bounds"
        *bounds, last = bounds
        self._sample.limit(last)
        self.selector.limit(bounds)

    def state(self) -> dict[str, Tensor]:
        """The run so far, as tensors; its selector must be `Resumable`."""
        assert isinstance(self.selector, Resumable), "checked before work begins"
        selector, sample = self.selector.state(), self._sample.state()
        return _prefixed(_SELECTOR, selector) | _prefixed(_SAMPLE, sample)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the state of a run of the same recipe; this one must be fresh."""
        assert isinstance(self.selector, Resumable), "checked before work begins"
        self.selector.load(_without_prefix(_SELECTOR, state))
        self._sample.load(_without_prefix(_SAMPLE, state))

    def merge(self, other: "Point") -> None:
        """Take in a run of the same recipe on another part of the stream."""
        assert isinstance(self.selector, Resumable), "checked before work begins"
        self.selector.merge(other.selector)
        self._sample.merge(other._sample)

    def finish(self, progress: bool) -> Finished:
        """The dictionary; the threshold at which its codes have the mean L0 that was asked for, 0 where
        none was; and the usual residual, where there are texts enough to hold some out."""
        dictionary = self.selector.finish(progress)
        coding, atoms = coding_of(self._recipe, dictionary), dictionary.atoms
        folds, atom_folds = assign_folds(self._sample.places(), dictionary.labels)
        x = self._sample.rows() - dictionary.mean
        threshold = 0.0
        if self._recipe.l0 is not None:
            threshold = calibrate_out_of_fold(
                x, folds, atoms, atom_folds, self._recipe.l0, coding.k,
                method=coding.method, signed=coding.signed, rtol=coding.rtol,
            )  # fmt: skip
        unexplained = None
        if (atom_folds >= 0).any():
            coding = replace(coding, threshold=threshold)
            left = unexplained_out_of_fold(x, folds, atoms, atom_folds, coding).cpu()
            steps = torch.linspace(0, 1, QUANTILES, dtype=left.dtype, device=left.device)
            unexplained = [float(f"{value:.4g}") for value in left.quantile(steps).tolist()]
        return Finished(dictionary, threshold, unexplained)


def coding_of(recipe: Recipe, dictionary: Dictionary) -> Coding:
    """The recipe's coding; a dictionary of fewer atoms than its k has shorter codes."""
    return replace(recipe.coding, k=min(recipe.coding.k, len(dictionary.atoms)))


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def _without_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
