"""A run at one hook point: the rule's selector, and the rows on which a threshold is calibrated."""

from collections.abc import Mapping, Sequence

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
from itda_lens.pursuit import calibrate_out_of_fold
from itda_lens.records import Places
from itda_lens.training.recipe import Recipe

CALIBRATION_ROWS = 2048
"""Activations on which a threshold is calibrated. The error of their mean L0 is a 45th of the standard
deviation of L0."""

CALIBRATION_SEED = 3
"""Added to a recipe's seed, so that the calibration's sample shares no priorities with those of a
rule."""


_SELECTOR, _SAMPLE = "selector.", "calibration."


class Point:
    """The run at one hook point: the rule's selector, and the rows that a threshold is calibrated on.

    The rows belong to the run, not to the rule, so that every rule works with a mean L0.
    """

    def __init__(self, recipe: Recipe, d_in: int, dtype: torch.dtype, device: torch.device) -> None:
        self.selector: Selector = recipe.rule.selector(
            recipe.request(d_in=d_in, dtype=dtype, device=device)
        )
        self.stream = (d_in, str(dtype).removeprefix("torch."))
        """Width and dtype of the rows, as plain data."""
        self._recipe = recipe
        self._sample = None
        if recipe.l0 is not None:
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
        if self._sample is not None:
            self._sample.update(x, places)

    def bounds(self, spare: float) -> list[PriorityBound]:
        """Fresh bounds of all samples; none if the rule cannot tell which rows it will look at."""
        if not isinstance(self.selector, Foreseeing):
            return []
        own = [] if self._sample is None else [self._sample.bound(spare)]
        return [*self.selector.bounds(spare), *own]

    def limit(self, bounds: Sequence[int]) -> None:
        """Pass over rows beyond these values of `bounds`."""
        if not bounds:
            return
        assert isinstance(self.selector, Foreseeing), "only such a selector has bounds"
        if self._sample is not None:
            *bounds, last = bounds
            self._sample.limit(last)
        self.selector.limit(bounds)

    def state(self) -> dict[str, Tensor]:
        """The run so far, as tensors; its selector must be `Resumable`."""
        assert isinstance(self.selector, Resumable), "checked before work begins"
        sample = {} if self._sample is None else self._sample.state()
        return _prefixed(_SELECTOR, self.selector.state()) | _prefixed(_SAMPLE, sample)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the state of a run of the same recipe; this one must be fresh."""
        assert isinstance(self.selector, Resumable), "checked before work begins"
        self.selector.load(_without_prefix(_SELECTOR, state))
        if self._sample is not None:
            self._sample.load(_without_prefix(_SAMPLE, state))

    def merge(self, other: "Point") -> None:
        """Take in a run of the same recipe on another part of the stream."""
        assert isinstance(self.selector, Resumable), "checked before work begins"
        self.selector.merge(other.selector)
        if self._sample is not None:
            self._sample.merge(other._sample)  # pyright: ignore[reportArgumentType] (both have one)

    def finish(self, progress: bool) -> tuple[Dictionary, float]:
        """The dictionary, and the threshold at which its codes have the mean L0 that was asked for."""
        dictionary = self.selector.finish(progress)
        if self._sample is None or self._recipe.l0 is None:
            return dictionary, 0.0
        coding = self._recipe.coding
        folds, atom_folds = assign_folds(self._sample.places(), dictionary.labels)
        threshold = calibrate_out_of_fold(
            self._sample.rows() - dictionary.mean,
            folds,
            dictionary.atoms,
            atom_folds,
            self._recipe.l0,
            min(coding.k, len(dictionary.atoms)),
            method=coding.method,
            signed=coding.signed,
            rtol=coding.rtol,
        )
        return dictionary, threshold


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def _without_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
