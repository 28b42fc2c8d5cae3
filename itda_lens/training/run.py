"""One pass over a source: a selector for each hook point, then dictionaries."""

import logging
import time
from dataclasses import replace
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from itda_lens.dictionary import Dictionary, Guided, Sated, Selector, StreamSample, assign_folds
from itda_lens.pursuit import Coding, calibrate_out_of_fold, unexplained_out_of_fold
from itda_lens.records import Provenance, at_least, checked, versions
from itda_lens.sae import ITDA, assemble
from itda_lens.sources import ActivationSource, Rows, hook_is_per_head
from itda_lens.training.recipe import Recipe

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_FVU = 5.0
"""Least time between two measurements of the progress bar's FVU: each is a small pursuit for every
hook."""

CALIBRATION_ROWS = 2048
"""Activations on which a threshold is calibrated, and the usual residual measured. The error of their
mean L0 is a 45th of the standard deviation of L0."""

QUANTILES = 101
"""Quantiles of the residual that are recorded: the least, each per cent, the largest."""

CALIBRATION_SEED = 3
"""Added to a recipe's seed, so that the calibration's sample shares no priorities with those of a
rule."""


class _Finished(NamedTuple):
    """A dictionary, the threshold of its codes, and the quantiles for `Provenance.unexplained`."""

    dictionary: Dictionary
    threshold: float
    unexplained: list[float] | None


@checked
def build_from(
    source: ActivationSource, recipe: Recipe, *, metadata: dict[str, object] | None = None,
    progress: bool = True,
) -> dict[str, ITDA]:  # fmt: skip
    """One labelled dictionary for each hook point of a source, from one reading of it.

    Args:
        source: where activations come from.
        recipe: how atoms are chosen and encode.
        metadata: more entries for `cfg.metadata`.
        progress: show a progress bar with rows/s and, where the rule tells them, atoms and FVU so far.

    Returns:
        The dictionaries by hook name, in the order of `source.hooks`.

    Raises:
        ValueError: there are no rows, NaN or infinite ones, or fewer distinct ones than `recipe.d_sae`.
    """
    check_enough(recipe, source.n_rows)
    with torch.no_grad():
        points = _read(source, recipe, progress)
        if missing := [hook for hook in source.hooks if hook not in points]:
            raise ValueError(f"the source must give at least one row, got none at {missing}")
        chosen = {hook: points[hook].finish(progress) for hook in source.hooks}
    made = {}
    for hook, finished in chosen.items():
        logger.info("%s: %d atoms chosen", hook, len(finished.dictionary.atoms))
        provenance = replace(
            source.provenance(hook), recipe=recipe.record(), versions=versions(),
            unexplained=finished.unexplained,
        )  # fmt: skip
        made[hook] = _assembled(finished, recipe, provenance, metadata or {})
    return made


@checked
def check_enough(recipe: Recipe, n_rows: int | None) -> None:
    """Refuse a dictionary of more atoms than there will be activations.

    Raises:
        ValueError: there are fewer.
    """
    at_least(1, n_rows=n_rows)
    if recipe.d_sae is not None and n_rows and recipe.d_sae > n_rows:
        raise ValueError(
            f"d_sae must be at most the number of activations: got d_sae={recipe.d_sae} for "
            f"{n_rows} rows"
        )


class _Point:
    """The run at one hook point: the rule's selector, and a sample of rows.

    On the sample a threshold is calibrated, and the usual residual is measured. It belongs to the run,
    not to the rule, so that every rule has both.
    """

    def __init__(self, recipe: Recipe, x: torch.Tensor) -> None:
        self.selector: Selector = recipe.rule.selector(
            recipe.request(d_in=x.shape[1], dtype=x.dtype, device=x.device)
        )
        self._recipe = recipe
        seed = recipe.seed + CALIBRATION_SEED
        self._sample = StreamSample(
            x.shape[1], CALIBRATION_ROWS, seed, x.dtype, x.device, distinct=False, labelled=False
        )

    @property
    def done(self) -> bool:
        return isinstance(self.selector, Sated) and self.selector.done

    def update(self, x: torch.Tensor, rows: Rows) -> None:
        self.selector.update(x, rows.places)
        self._sample.update(x, rows.places)

    def finish(self, progress: bool) -> _Finished:
        """The dictionary; the threshold at which its codes have the mean L0 that was asked for, 0 where
        none was; and the usual residual, where there are texts enough to hold some out."""
        dictionary = self.selector.finish(progress)
        coding, atoms = _coding_of(self._recipe, dictionary), dictionary.atoms
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
            steps = torch.linspace(0, 1, QUANTILES, dtype=left.dtype)
            unexplained = [float(f"{value:.4g}") for value in left.quantile(steps).tolist()]
        return _Finished(dictionary, threshold, unexplained)


def _read(source: ActivationSource, recipe: Recipe, progress: bool) -> dict[str, _Point]:
    points: dict[str, _Point] = {}
    fvu_at = time.perf_counter()
    with tqdm(
        total=source.n_rows, unit="tok", unit_scale=True, desc="building", disable=not progress
    ) as bar:
        for rows in source.rows():
            for hook, x in rows.values.items():
                if hook not in points:
                    points[hook] = _Point(recipe, x)
                points[hook].update(x, rows)
            bar.update(len(rows.places))
            now = time.perf_counter()
            if progress and now - fvu_at > SECONDS_BETWEEN_FVU:
                fvu_at = now
                bar.set_postfix(_status(points))
            if all(point.done for point in points.values()):
                break
    return points


def _status(points: dict[str, _Point]) -> dict[str, str]:
    guides = [point.selector for point in points.values() if isinstance(point.selector, Guided)]
    return {
        "atoms": "/".join(str(guide.n_atoms) for guide in guides),
        "FVU": "/".join(f"{guide.running_fvu():.3f}" for guide in guides),
    }


def _coding_of(recipe: Recipe, dictionary: Dictionary) -> Coding:
    """The recipe's coding; a dictionary of fewer atoms than its k has shorter codes."""
    return replace(recipe.coding, k=min(recipe.coding.k, len(dictionary.atoms)))


def _assembled(
    finished: _Finished, recipe: Recipe, provenance: Provenance, metadata: dict[str, object]
) -> ITDA:
    dictionary = finished.dictionary
    coding = replace(_coding_of(recipe, dictionary), threshold=finished.threshold)
    hook = provenance.hook_name
    itda = assemble(
        dictionary.atoms,
        dictionary.mean,
        coding=coding,
        l0=recipe.l0,
        labels=dictionary.labels,
        metadata=metadata,
        reshape_activations="hook_z" if hook and hook_is_per_head(hook) else "none",
    )
    provenance.into(itda.cfg.metadata)
    return itda
